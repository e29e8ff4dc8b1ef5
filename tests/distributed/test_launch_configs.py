"""Every file of launch/accelerate and launch/deepspeed trains in real processes on CPU what one process trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cases import train_cases
from conftest import PATIENCE, ROOT, beyond, tiny_values
from processes import free_port
from test_launch_files import JSONS, LAUNCHER_CONFIGS, SETTINGS, YAMLS, header_command
from test_launchers import STEPS, assert_equal_losses, rows

pytestmark = pytest.mark.slow

FILES = {path.name: path for path in YAMLS}


def run(path: Path, values: dict, tmp_path: Path, *changes: dict[str, str]) -> list[str]:
    """Start the command in a file's header once for each of `changes` to its options, all at once; what each said."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    started = []
    for options in changes:
        words = [str(config) if word == "CONFIG.yaml" else word for word in header_command(path, **options)]
        words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words]
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT))
    try:
        said = [process.communicate(timeout=PATIENCE)[0] for process in started]
    finally:
        for process in started:
            process.terminate()  # which a launcher that still runs passes on to its processes; a SIGKILL it could not
            process.wait(timeout=PATIENCE)
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text
    return said


@pytest.fixture(scope="module")
def single(tiny_dataset, tmp_path_factory) -> Path:
    """The run of single_gpu.yaml, one process: what every other file must equal."""
    tmp_path = tmp_path_factory.mktemp("single")
    values = tiny_values(tiny_dataset, tmp_path / "run", max_steps=STEPS, evaluation__every=5)
    (said,) = run(FILES["single_gpu.yaml"], values, tmp_path, {})
    assert "engine: single on 1 x CPU" in said
    return tmp_path / "run"


OTHERS = sorted(LAUNCHER_CONFIGS.keys() - {"single_gpu.yaml"})


@pytest.mark.parametrize("file", beyond(("multi_node.yaml", "zero2.yaml"), OTHERS))
def test_an_accelerate_file(single, tiny_dataset, tmp_path, file):
    """Two processes; of multi_node.yaml each on a machine of its own, as far as their launchers know."""
    values = tiny_values(tiny_dataset, tmp_path / "run", max_steps=STEPS, evaluation__every=5)
    common, machines = {"num_processes": "2"}, [{}]
    if file == "multi_node.yaml":
        common |= {"main_process_ip": "127.0.0.1", "main_process_port": free_port()}
        machines = [{"machine_rank": "0"}, {"machine_rank": "1"}]
    said = run(FILES[file], values, tmp_path, *(common | machine for machine in machines))
    assert f"engine: {LAUNCHER_CONFIGS[file].get('strategy', 'ddp')} on 2 x CPU" in said[0]
    assert_equal_losses(tmp_path / "run", single)


def test_deepspeed_files(single, tiny_dataset, tmp_path):
    """Each in fp32 against one process; in bf16, with buckets of which the model fills several, against the same
    strategy without the file."""
    cases = []
    for path in JSONS:
        strategy, offload = SETTINGS[path.name]
        plain = {"strategy": strategy, "offload": offload}
        small = json.loads(path.read_text())
        small["zero_optimization"]["reduce_bucket_size"] = 25_000  # the largest of 66,689 parameters has 20,480
        (tmp_path / path.name).write_text(json.dumps(small))
        for way, precision, engine in (
            ("as it is", "fp32", plain | {"deepspeed_config": str(path)}),
            ("small buckets", "bf16", plain | {"deepspeed_config": str(tmp_path / path.name)}),
            ("no file", "bf16", plain),
        ):
            values = tiny_values(
                tiny_dataset, tmp_path / "run", max_steps=STEPS, precision=precision, engine=engine,
                batch__tokens_per_microbatch=128,
            )  # fmt: skip
            cases.append({"name": f"{path.name} {way}", "values": values, "steps": 5})
    results = train_cases(cases, 2, tmp_path)
    reference = rows(single)[:5]
    for path in JSONS:
        as_it_is, small, plain = (results[f"{path.name} {way}"] for way in ("as it is", "small buckets", "no file"))
        assert max(as_it_is["microbatches"]) > 1
        for key in ("loss", "grad_norm"):
            # As assert_equal_losses has it.
            assert as_it_is[key] == pytest.approx([row[key] for row in reference], rel=3e-4), (path.name, key)
            # Two summands have one sum in whatever bucket: the bf16 gradients are equal to the bit, and the fp32 norm
            # is to 512 * 2^-24, the order of its summands.
            assert small[key] == pytest.approx(plain[key], rel=3e-5), (path.name, key)
