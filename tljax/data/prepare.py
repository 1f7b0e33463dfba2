"""Builds a TFDS data set once, so that training reads it with neither TensorFlow nor a network.

python -m tljax.data.prepare fashion_mnist --data_dir=~/tensorflow_datasets [--manual_dir=raw/files]
"""

import argparse
import importlib.util
from pathlib import Path

from tljax.command import run
from tljax.data.tfds import data_root
from tljax.errors import UserError, listing, unknown


def prepare(name: str, data_dir: str = "", manual_dir: str = "", download: bool = False) -> Path:
    """Builds `name` as array_record files below `data_dir` and returns their directory. Raises UserError.

    With `manual_dir` the raw files, under their original names, are taken from there, and with all of them
    in place no network is needed. `download` allows to fetch what is missing beside them.
    """
    for module in ("tensorflow_datasets", "tensorflow"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{module} is not installed: pip install -e '.[prepare]'")
    import tensorflow_datasets as tfds

    root = data_root(data_dir)
    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        raise unknown("TFDS data set", name, tfds.list_builders(with_community_datasets=False)) from None
    if manual_dir:
        manual = Path(manual_dir).expanduser()
        if not manual.is_dir():
            raise UserError(f"no such directory: {manual}")
        # TFDS would retry a missing file for minutes before it says anything.
        wanted = {info.filename for info in (builder.url_infos or {}).values() if info.filename}
        absent = sorted(file for file in wanted if not (manual / file).exists())
        if absent and not download:
            raise UserError(f"{manual} lacks {listing(absent)}; --download fetches what is missing")
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir or None))
    except (tfds.download.DownloadError, tfds.download.download_manager.NonMatchingChecksumError) as error:
        raise UserError(str(error).splitlines()[0]) from None
    return Path(builder.data_dir)


def main(argv: list[str]) -> int:
    """Builds a TFDS data set."""
    parser = argparse.ArgumentParser("tljax.data.prepare", description="Builds a TFDS data set for tljax.")
    parser.add_argument("name", help="as TFDS spells it, for example emnist/balanced")
    parser.add_argument("--data_dir", default="", help="where to build it (default: TFDS's own)")
    parser.add_argument("--manual_dir", default="", help="where the raw files lie, under their original names")
    parser.add_argument("--download", action="store_true", help="fetch what manual_dir lacks")
    print("prepared:", prepare(**vars(parser.parse_args(argv))))
    return 0


if __name__ == "__main__":
    run(main)
