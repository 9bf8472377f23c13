"""Everything that a finished run is shipped as, several at a time."""

from pathlib import Path

from phyla.errors import InputError
from phyla.image_table import export_parquet
from phyla.onnx_file import export_onnx
from phyla.prediction import export_folders


def export_run(run: Path, *, onnx: Path | None = None, parquet: Path | None = None, embeddings: bool = False,
               folders: Path | None = None, min_confidence: float = 0.0, link: bool = False) -> list[str]:
    """Write whatever is asked for, and return a line on each.

    Parameters
    ----------
    onnx, parquet : files; see ``export_onnx`` and ``export_parquet``, whose ``embeddings`` these are
    folders : see ``export_folders``, whose ``min_confidence`` and ``link`` these are

    Raises
    ------
    InputError
        Nothing is asked for, an option is of something that is not, or the run cannot give it.
    """
    if onnx is None and parquet is None and folders is None:
        raise InputError("nothing to export is named", "give --onnx FILE, --parquet FILE, --folders FOLDER, or several")
    if embeddings and parquet is None:
        raise InputError("--embeddings are a column of the Parquet table", "give --parquet FILE, too")
    if folders is None and (link or min_confidence):
        raise InputError("--min-confidence and --link are for folders", "give --folders FOLDER, too")
    told = []
    if folders is not None:  # first: it refuses before it works
        told.append(f"{export_folders(run, folders, min_confidence=min_confidence, link=link)} images in {folders}")
    if parquet is not None:
        told.append(f"{export_parquet(run, parquet, embeddings=embeddings)} images in {parquet}")
    if onnx is not None:
        made = export_onnx(run, onnx)
        told.append(f"classifier of {made.n_bytes / 1e6:.1f} MB in {onnx}, probabilities within {made.difference:.0e} "
                    f"of torch's on {made.n_checked} images")
    return told
