import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

from benchmarks import compiled
from reproduction import tables

PROGRAM = """\
HloModule jit_f, input_output_alias={ {0}: (0, {}, may-alias) }

%sum (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %c = bf16[] add(%a, %b)
}

%body (state: (f32[8,3], u8[45000,4])) -> (f32[8,3], u8[45000,4]) {
  %state = (f32[8,3]{1,0}, /*index=1*/u8[45000,4]{1,0}) parameter(0)
  %w = f32[8,3]{1,0} get-tuple-element(%state), index=0
  %data = u8[45000,4]{1,0} get-tuple-element(%state), index=1
  %y = (bf16[16,8]{1,0}, u8[0]{0}) custom-call(%data, %w), custom_call_target="__cudnn$convForward", dim_labels=b01f_o01i->b01f
  %start = f32[8,3]{1,0} all-reduce-start(%w), to_apply=%sum
  %done = f32[8,3]{1,0} all-reduce-done(%start)
  ROOT %out = (f32[8,3]{1,0}, u8[45000,4]{1,0}) tuple(%done, %data)
}

ENTRY %main (p: (f32[8,3], u8[45000,4])) -> (f32[8,3], u8[45000,4]) {
  %p = (f32[8,3]{1,0}, u8[45000,4]{1,0}) parameter(0)
  ROOT %loop = (f32[8,3]{1,0}, u8[45000,4]{1,0}) while(%p), condition=%condition, body=%body
}
"""


def test_a_program_is_read_line_by_line():
    computations, entry = compiled.parse(PROGRAM)
    assert entry == "main"
    assert [i.opcode for i in compiled._loop(computations, entry)] == [
        *("parameter", "get-tuple-element", "get-tuple-element", "custom-call", "all-reduce-start", "all-reduce-done"),
        "tuple",
    ]
    convolution = computations["body"][3]
    assert convolution.operands == ("data", "w")
    assert compiled.arrays(convolution.shape) == [("bf16", (16, 8)), ("u8", (0,))]
    assert compiled.num_bytes(convolution.shape) == 2 * 16 * 8


def test_of_all_images_only_those_of_a_batch_are_counted(tiny_config):
    tiny_config.batch_size = 90  # a five-hundredth of 45,000
    computations, entry = compiled.parse(PROGRAM)
    weights, images, outputs = 4 * 8 * 3, 45_000 * 4 // 500, 2 * 16 * 8
    assert (
        sum(compiled._moved(compiled._loop(computations, entry), tiny_config))
        == (outputs + images + weights) + 2 * weights
    )


def test_a_target_that_nothing_compiles_for_is_one_line(tmp_path):
    if any(re.fullmatch(r"jax.cuda\d+.plugin", d.name) for d in importlib.metadata.distributions()):
        pytest.skip("jax's CUDA plugin is installed here")
    output = tmp_path / "compiled.json"
    command = ["-m", "benchmarks.compiled", "--config", "configs/final.py", "--targets=h100", f"--output={output}"]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert "install the packages" in line
    assert not output.exists()


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """What `benchmarks.compiled` counts for an H100 and four v5e at batch 128, and for eight H100 at 1,024."""
    folder = tmp_path_factory.mktemp("accelerators")
    (libtpu,) = (re.sub(r";.*", "", r) for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu"))
    cuda = (
        f"{package}=={importlib.metadata.version('jaxlib')}" for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt")
    )
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *cuda, libtpu]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"the packages that compile for accelerators cannot be installed: {installed.stderr[-300:]}")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # else libtpu asks the network about the machine
    }
    found = {}
    for targets, batch_size in (("h100,v5e-4", 128), ("h100-8", 1024)):
        output = folder / f"{batch_size}.json"
        flags = [
            "--config=configs/final.py",
            f"--targets={targets}",
            f"--batch-sizes={batch_size}",
            f"--output={output}",
        ]
        command = [sys.executable, "-m", "benchmarks.compiled", *flags]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        result = json.loads(output.read_text())
        assert f"| {batch_size:,} |" in tables.table(result)
        found |= {program["target"]: program for program in result["compiled"]}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", compiled.TARGETS)
def test_the_loop_compiles_for_accelerators_as_it_should(programs, target):
    program = programs[target]
    convolutions = {kind: count for kind, count in program["convolutions"].items() if len(kind.split()[1]) == 4}
    assert {kind.split()[0] for kind in convolutions} == {
        "bf16"
    }  # others are the classifier's, as a TPU multiplies matrices
    assert sum(convolutions.values()) == 74  # 25 layers forward, 25 for kernels, 24 for inputs
    assert program["bfloat16_sums"] == 0  # the statistics of batch norm
    assert program["to_host"] == 0
    assert program["donated"]
    assert program["temporary_bytes"] <= 600e6
    if target.startswith("h100"):
        assert [*convolutions] == ["bf16 b01f"]
        assert program["transposed_activations"] == 0


@pytest.mark.slow
def test_several_devices_add_their_gradients_once(programs):
    for target in ("h100-8", "v5e-4"):
        sums = programs[target]["all_reduces"]
        count, size = sums["bf16"]
        assert count == 1
        assert size == pytest.approx(2 * 4_918_602, rel=0.01)  # all kernels of convolutions
        assert sums["f32"][0] < 50  # batch norm's, forward and backward, and the rest of the gradient
