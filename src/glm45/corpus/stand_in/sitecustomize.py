"""A build backend that stands in for every package's own while pip downloads.

`pip download` has a source distribution prepare its metadata, which installs and runs whatever its build asks for, and
then throws the metadata away. `PKG-INFO` in the archive holds it already, so that nothing needs to be run.
"""

import os
import shutil
from email.parser import HeaderParser
from pathlib import Path

for prefix in ("PEP517", "_PYPROJECT_HOOKS"):  # before pip 24 and since, in the process that pip starts for a backend
    if f"{prefix}_BUILD_BACKEND" in os.environ:
        os.environ[f"{prefix}_BUILD_BACKEND"] = __name__
        os.environ.pop(f"{prefix}_BACKEND_PATH", None)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: object = None) -> str:
    """Answer pip (PEP 517) with the archive's own `PKG-INFO`; the working directory is the unpacked archive."""
    fields = HeaderParser().parsestr(Path("PKG-INFO").read_text(encoding="utf-8"))
    folder = Path(metadata_directory, f"{fields['Name'].replace('-', '_')}-{fields['Version']}.dist-info")
    folder.mkdir()
    shutil.copy("PKG-INFO", folder / "METADATA")
    return folder.name
