"""`pip install .` gives a package that works: what is in the wheel, its scripts, and what it says that it needs."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from running import ROOT

pytestmark = pytest.mark.slow

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = {
    "comet_ml": "comet-ml",
    "yaml": "pyyaml",
    "sklearn": "scikit_learn",
    "huggingface_hub": "huggingface_hub",
}  # of modules, where the package's is another


# Those that only look at files: they begin in a moment.
QUICK = ("noisefit-score", "noisefit-report", "noisefit-threshold", "noisefit-judge", "noisefit-benchmarks")


def quietly(command: list[object], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, installed into a folder of its own beside the libraries that the tests run with."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "noisefit", source / "noisefit")  # setuptools leaves its own files beside what it builds
    for name in ("pyproject.toml", "README.md", "train_loop.py", "generate.py"):
        shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    done = quietly(build, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = folder.glob("*.whl")
    done = quietly([*pip, "install", "--no-deps", "--target", folder / "site", wheel])
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(installed):
    [wheel] = installed.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "noisefit").rglob("*.py")}
    assert set(names) == expected | {"train_loop.py", "generate.py", "noisefit/py.typed"}


def environment_of(installed: Path, **more: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return environment | {"PYTHONPATH": str(installed / "site"), "ACCELERATE_USE_CPU": "true"} | more


@pytest.mark.parametrize("script", QUICK)
def test_the_scripts_that_only_look_at_files_run_from_it_and_import_nothing_that_takes_seconds(
    script, installed, tmp_path
):
    script = installed / "site" / "bin" / script
    done = quietly([script, "--help"], cwd=tmp_path, env=environment_of(installed, PYTHONPROFILEIMPORTTIME="1"))
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tqdm" in imported and not imported & {
        "torch",
        "transformers",
        "accelerate",
        "scipy",
        "sklearn",
        "matplotlib",
    }
    done = quietly([script, "--nonsense"], cwd=tmp_path, env=environment_of(installed))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


NOTEBOOK = """
import contextlib, io, json, runpy, sys
from noisefit import AnswerSettings, Settings, generate, train
import noisefit
assert noisefit.__file__.startswith({folder!r})
train(Settings(model={model!r}, train_data="q.csv", output_model="out", max_steps=1))
generate(AnswerSettings(model_path="out", input_csv="q.csv", output_csv="a.csv", rounds=1, max_new_tokens=2))
said = {{}}
try:
    Settings(model="m", train_data="t", noise_std=-1)
except noisefit.base.errors.InputError as error:
    said["error"] = str(error)
for script in {scripts!r}:
    sys.argv = [script, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            said[script] = [end.code, text.getvalue()]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def used(installed, llama_folder, tmp_path_factory) -> tuple[Path, dict[str, object]]:
    """What a notebook does with it and what the scripts say whose imports take seconds, in one process: its folder, and
    what it said."""
    folder = tmp_path_factory.mktemp("used")
    (folder / "q.csv").write_text("prompt,response\n" + "".join(f"What is {i}?,It is {i}.\n" for i in range(8)))
    scripts = [str(installed / "site" / "bin" / script) for script in PROJECT["scripts"]]
    program = NOTEBOOK.format(folder=str(installed), model=str(llama_folder), scripts=scripts)
    done = quietly([sys.executable, "-c", program], cwd=folder, env=environment_of(installed))
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_a_notebook_trains_with_it(used):
    folder, said = used
    assert "--noise_std: '-1' is not a number" in said["error"]
    assert (folder / "out" / "adapter_model.safetensors").exists() and (folder / "a.csv").exists()


@pytest.mark.parametrize("script", PROJECT["scripts"])
def test_the_scripts_run_from_it(script, installed, used):
    status, text = used[1][str(installed / "site" / "bin" / script)]
    assert status == 0 and "usage: " in text


def test_every_program_of_the_package_has_a_script():
    programs = {path.stem for path in (ROOT / "noisefit").glob("*.py") if "__main__" in path.read_text()}
    assert {f"noisefit-{name}" for name in (*programs, "train", "generate", "report")} == PROJECT["scripts"].keys()


def test_every_import_is_declared():
    declared = {part.lower().replace("-", "_") for part in _names(PROJECT["dependencies"])}
    optional = {part for extra in PROJECT["optional-dependencies"].values() for part in _names(extra)}
    own = {"noisefit", "train_loop", "generate"}
    for path in [*(ROOT / "noisefit").rglob("*.py"), ROOT / "train_loop.py", ROOT / "generate.py"]:
        for module in _imports(path) - own - set(sys.stdlib_module_names):
            name = NAMES.get(module, module)
            assert name in declared | optional, f"{path.relative_to(ROOT)} imports {module}"
    for name in ("wandb", "matplotlib", "bitsandbytes", "openai"):
        assert name in optional and name not in declared


def test_the_pins_are_within_the_ranges():
    from packaging.requirements import Requirement

    ranges = {r.name.lower(): r for r in map(Requirement, [*PROJECT["dependencies"], *_extras()])}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if "==" in line:
            name, _, version = line.partition("==")
            assert ranges[name.lower()].specifier.contains(version), line
        elif line and not line.startswith("#"):
            assert line.partition(">=")[0].lower() in ranges, line
    assert sysconfig.get_python_version() >= PROJECT["requires-python"].removeprefix(">=")


def _extras() -> list[str]:
    return [line for extra in PROJECT["optional-dependencies"].values() for line in extra]


def _names(lines: list[str]) -> set[str]:
    return {line.partition(">=")[0].partition("==")[0].strip().lower() for line in lines}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found
