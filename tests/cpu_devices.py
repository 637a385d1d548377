"""Several devices on one CPU, for the tests of what happens between devices."""


def xla_flags(count: int) -> str:
    """The value of XLA_FLAGS that makes JAX see so many CPU devices.

    XLA ends a process in which a device waits 40 seconds for another. On a busy machine that is no fault, so here it may wait ten minutes.
    """
    return f"--xla_force_host_platform_device_count={count} --xla_cpu_collective_call_terminate_timeout_seconds=600"
