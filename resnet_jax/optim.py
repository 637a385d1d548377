"""Learning-rate schedules and optimizers, as optax chains that equal the report's formulas and PyTorch's."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from optax import contrib


def make_schedule(config: ConfigDict, steps_per_epoch: float) -> optax.Schedule:
    """Return the learning rate as a function of the number of steps done; it changes at every step.

    With t = step / steps_per_epoch, in epochs:

    - "warmup_cosine" (report, section 2d): eta * t / T_warmup while t < T_warmup, then
      eta_min + (eta - eta_min) / 2 * (1 + cos(pi * (t - T_warmup) / (T_total - T_warmup))), eta_min = min_ratio * eta.
    - "warmup_linear": the same with a straight line instead of the cosine: a triangle.
    - "step": eta * decay_factor ** floor(t / decay_every_epochs).

    At each of `restart_epochs` it begins anew without warm-up (arXiv:1608.03983): t counts from there, T_total to the next.

    Args:
        config: the whole config; reads `optim.learning_rate`, `num_epochs` and `schedule`.
        steps_per_epoch: examples / batch size, not rounded.
    """
    eta, schedule = config.optim.learning_rate, config.schedule
    ends = (*schedule.restart_epochs, config.num_epochs)

    def piece(xp: Any, step: Any, start: float, epochs: float, warmup_epochs: float) -> Any:
        if schedule.name == "step":  # by comparisons, because XLA rounds a quotient
            every = schedule.decay_every_epochs
            periods = np.arange(1, min(epochs / every, 1e5) + 1).reshape((1,) * np.ndim(step) + (-1,))
            passed = xp.asarray(step)[..., None] >= steps_at(start + every * periods)
            return eta * schedule.decay_factor ** passed.sum(-1).astype(float)
        step = step - round(start * steps_per_epoch, 6)
        warmup_steps, eta_min = warmup_epochs * steps_per_epoch, schedule.min_ratio * eta
        done = xp.clip((step - warmup_steps) / (epochs * steps_per_epoch - warmup_steps), 0.0, 1.0)
        decay = 1.0 - done if schedule.name == "warmup_linear" else 0.5 * (1.0 + xp.cos(xp.pi * done))
        return xp.where(step < warmup_steps, eta * step / max(warmup_steps, 1e-9), eta_min + (eta - eta_min) * decay)

    def steps_at(epochs: Any) -> Any:
        """The steps that begin at or after some epochs: 1,875, where floats make it 1,875.0000000000002."""
        return np.minimum(np.ceil(np.round(epochs * steps_per_epoch, 6)), 2**31 - 1).astype(np.int32)

    def learning_rate(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        xp: Any = np if isinstance(step, int) else jnp  # on the host for the log, which must not wait for a device
        rate = piece(xp, step, 0.0, ends[0], schedule.get("warmup_epochs", 0.0))
        for start, end in itertools.pairwise(ends):
            rate = xp.where(step < steps_at(start), rate, piece(xp, step, start, end - start, 0.0))
        return rate

    return learning_rate


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Build the optimizer that `config.optim` describes, with its schedule.

    - "adamw" (arXiv:1711.05101): theta -= eta_t * (m_hat / (sqrt(v_hat) + eps) + weight_decay * theta).
    - "sgd", as in `torch.optim.SGD`: g += weight_decay * theta (coupled L2); the buffer is g at the first step and
      later momentum * buffer + (1 - dampening) * g; theta -= eta_t * buffer.
    - "nesterov", as in `torch.optim.SGD` with `nesterov`: likewise without dampening; theta -= eta_t * (g + momentum * buffer).
    - "muon" (Jordan, 2024): the momentum of each convolution's kernel but the stem's, orthogonalised as a matrix
      [k * k * channels, channels out]; all other parameters are left to Adam with Nesterov's momentum, at eta_t * adam_ratio.
      Weight decay as in "adamw".
    - "muon_normalized" (Jordan's airbench94_muon): the same, but a step first scales the kernels whose momentum is
      orthogonalised to the norm sqrt(channels out), which the batch norm after each does not see, and three iterations of
      Newton and Schulz orthogonalise instead of five.

    `max_grad_norm` > 0 clips the gradient's global norm first. `decay_mask` "kernels" does not decay biases and
    batch-norm parameters; "all" decays every parameter, as in the report. `backbone_rate` is a factor on eta_t for all
    parameters but the classifier's, and so on their weight decay; 0 leaves them. A whitened stem is not trained.
    """
    optim = config.optim
    kernels = (lambda params: jax.tree.map(lambda p: p.ndim > 1, params)) if optim.decay_mask == "kernels" else None
    decay = optax.add_decayed_weights(optim.weight_decay, kernels)
    clip = optax.clip_by_global_norm(optim.max_grad_norm) if optim.max_grad_norm > 0 else optax.identity()
    if optim.name == "adamw":
        update = optax.chain(optax.scale_by_adam(optim.b1, optim.b2, optim.eps), decay)
    elif optim.name == "nesterov":
        update = optax.chain(decay, optax.trace(optim.momentum, nesterov=True))
    elif optim.name in ("muon", "muon_normalized"):  # with rates of -1, because here the schedule changes the sign
        settings = {"adam_b1": optim.b1, "adam_b2": optim.b2, "eps": optim.eps, "adam_learning_rate": -optim.adam_ratio}
        settings["ns_steps"] = 3 if optim.name == "muon_normalized" else 5
        muon = contrib.muon(-1.0, beta=optim.momentum, muon_weight_dimension_numbers=_matrices, **settings)
        update = optax.chain(muon, decay)
    else:
        # optax.trace has no dampening. Scaling all gradients but the first gives the same buffer as PyTorch.
        undamped_first = optax.scale_by_schedule(lambda step: jnp.where(step == 0, 1.0, 1.0 - optim.dampening))
        update = optax.chain(decay, undamped_first, optax.trace(optim.momentum))
    steps = [clip, update, optax.scale_by_learning_rate(schedule)]
    if optim.backbone_rate != 1:
        scale = optax.scale(optim.backbone_rate) if optim.backbone_rate else optax.set_to_zero()
        steps.append(optax.masked(scale, lambda params: {name: name != "classifier" for name in params}))
    if optim.name == "muon_normalized" and optim.backbone_rate:
        normalize = optax.stateless_with_tree_map(lambda u, w: u + (w.shape[3] ** 0.5 / jnp.linalg.norm(w) - 1.0) * w)
        steps.append(optax.masked(normalize, _hidden_convolutions))
    if config.model.stem == "whitened":
        steps.append(optax.masked(optax.set_to_zero(), lambda params: {name: "stem" in name for name in params}))
    return optax.chain(*steps)


def _hidden_convolutions(params: optax.Params) -> optax.Params:
    """Whether Muon orthogonalises a parameter: the kernels of all convolutions but the stem."""
    return jax.tree.map(lambda p: p.ndim == 4, params) | {"stem_conv": {"kernel": False}}


def _matrices(params: optax.Params) -> optax.Params:
    """The axes of what Muon orthogonalises; None for the parameters of Adam."""
    axes = contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    return jax.tree.map(lambda hidden: axes if hidden else None, _hidden_convolutions(params))
