"""`make peft-suite`: fetch PEFT's tests from PyPI and run them with our configurations.

Arguments go to pytest, such as `-k Llama`; with any, the list is not held to be complete.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from tests.clients.peft_suite import models
from tests.clients.peft_suite.failures import VERSION

FOLDER = Path("build/peft-suite")
PACKAGE = FOLDER / "peft_tests"
FILES = (
    "config",
    "custom_models",
    "decoder_models",
    "encoder_decoder_models",
    "feature_extraction_models",
    "seq_classifier",
    "token_classification_qa",
)
SETTINGS = """[pytest]
markers =
    single_gpu_tests
    multi_gpu_tests
    regression
    bitsandbytes
"""


def fetch() -> None:
    """The tests of the source distribution, as a package of another name than our `tests`."""
    archive = FOLDER / f"peft-{VERSION}.tar.gz"
    if not archive.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run(
            [*pip, "--no-binary", ":all:", "--dest", str(FOLDER), f"peft=={VERSION}"], check=True
        )
    PACKAGE.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as files:
        for member in files:
            path = Path(member.name)
            if path.parts[1:2] == ("tests",) and path.suffix == ".py":
                (PACKAGE / path.name).write_bytes(files.extractfile(member).read())
    (PACKAGE / "__init__.py").write_text("")
    (FOLDER / "pytest.ini").write_text(SETTINGS)


def main(arguments: list[str]) -> int:
    if (installed := version("peft")) != VERSION:
        raise SystemExit(
            f"The list of failures is of PEFT {VERSION}, and {installed} is installed: install "
            f"peft=={VERSION}, or bring tests/clients/peft_suite/failures.py up to date."
        )
    fetch()
    cache = (FOLDER / "hub").absolute()
    models.fill(cache)
    command = [sys.executable, "-m", "pytest", "-c", str(FOLDER / "pytest.ini")]
    command += ["-p", "tests.clients.peft_suite.plugin", "-p", "no:cacheprovider", "-q"]
    command += arguments or ["--whole", "-n", "2"]
    command += [str(PACKAGE / f"test_{name}.py") for name in FILES]
    environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run(command, env=os.environ | environment).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
