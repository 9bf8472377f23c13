"""A hundred thousand files: memory that does not grow with them, and a kill that costs no finished shard."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from phyla.classifier import Classifier
from phyla.images.augment import Views
from phyla.nets.heads import ClusterHeads, ClusterNet
from phyla.nets.resnet import EncoderSpec
from phyla.randomness import generator
from phyla.rundir import load_embeddings
from phyla.shards import SHARD

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the "
                                                   "peak of memory")]

FEW, MANY = 10_000, 100_000
MIB = 1 << 20


def make_files(folder: Path, n: int) -> Path:
    """Write ``n`` JPEG files of 48 pixels, a thousand a folder: crops of photographs, each file with other bytes."""
    draw, photos, cut = np.random.default_rng(0), load_sample_images().images, []
    for i in range(400):
        top, left = draw.integers(0, 427 - 48), draw.integers(0, 640 - 48)
        data = io.BytesIO()
        Image.fromarray(photos[i % 2][top : top + 48, left : left + 48]).save(data, "JPEG", quality=85)
        cut.append(data.getvalue())
    for i in range(n):
        if i % 1000 == 0:
            (folder / f"{i // 1000:03d}").mkdir(parents=True)
        data = cut[i % len(cut)]
        comment = b"\xff\xfe\x00\x0a%08d" % i
        (folder / f"{i // 1000:03d}" / f"{i:06d}.jpg").write_bytes(data[:2] + comment + data[2:])
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """Return folders of FEW and MANY files, and of a run whose classifier is small."""
    root = tmp_path_factory.mktemp("many")
    net = ClusterNet(EncoderSpec(width=4).build(generator(0, "test")), ClusterHeads(32, 10))
    net.heads.initialise(generator(1, "test"))
    Classifier(net, Views("plain", 16), 16).save(root / "run")
    return {n: make_files(root / str(n), n) for n in (FEW, MANY)} | {0: root / "run"}


CHILD = """
import sys
from pathlib import Path
from phyla.cli import main
try:
    main()
finally:
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(peak.split()[1], file=sys.stderr)
"""

EMBED = """
import sys
from pathlib import Path
import numpy as np
from phyla.classifier import Classifier
from phyla.embed import embed
from phyla.images.sources import open_images
run, photos, out = map(Path, sys.argv[1:])
classifier = Classifier.load(run)
images = open_images(photos, size=16, cache=out / "kept", keep="off").images
found = embed(images, classifier.net.encoder, classifier.views, folder=out / ".work")
np.save(out / "values.npy", found.values)
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(peak.split()[1], file=sys.stderr)
"""


def started(program: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stderr=subprocess.PIPE, text=True)


def peak(process: subprocess.Popen) -> int:
    """Return the most memory that a process had, once it has ended well."""
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    return int(said.split()[-1]) * 1024


def kill_at(process: subprocess.Popen, work: Path, n_shards: int) -> dict[Path, int]:
    """Kill a process once it has made some shards, and return these, and when each was made."""
    while len(list(work.glob("*.npz"))) < n_shards and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return {path: path.stat().st_mtime_ns for path in work.glob("*.npz")}


def test_prediction(folders, tmp_path, capsys):
    peaks, seconds = {}, {}
    for n in (FEW, MANY):
        begun = time.monotonic()
        peaks[n] = peak(started(CHILD, "predict", folders[0], folders[n], "--out", tmp_path / f"{n}.parquet",
                                "--embeddings", tmp_path / f"{n}.npy", "--quiet"))
        seconds[n] = time.monotonic() - begun
    with capsys.disabled():
        print("\npredict", {n: f"{peaks[n] / MIB:.0f} MiB, {seconds[n]:.1f} s" for n in peaks})
    assert pq.read_metadata(tmp_path / f"{MANY}.parquet").num_rows == MANY
    assert load_embeddings(tmp_path, str(MANY)).values.shape == (MANY, 32)
    assert peaks[MANY] - peaks[FEW] < 32 * MIB, "forty bytes a name, and what an allocator holds on to"

    out, work = tmp_path / "killed", tmp_path / "killed" / ".t.parquet.shards"
    command = ("predict", folders[0], folders[MANY], "--quiet", "--out", out / "t.parquet",
               "--embeddings", out / "t.npy")
    made = kill_at(started(CHILD, *command), work, 6)
    assert 6 <= len(made) < MANY // SHARD and not (out / "t.parquet").exists()
    again, kept = started(CHILD, *command), made
    while again.poll() is None:
        with suppress(FileNotFoundError):  # the work is joined and goes
            kept = {path: path.stat().st_mtime_ns for path in made}
        time.sleep(0.1)
    peak(again)
    assert kept == made, "finished shards are not made again"
    for name in ("parquet", "npy", "ids.json"):
        assert (out / f"t.{name}").read_bytes() == (tmp_path / f"{MANY}.{name}").read_bytes()


def test_embedding(folders, tmp_path, capsys):
    peaks, seconds = {}, {}
    for n in (FEW, MANY):
        (tmp_path / str(n)).mkdir()
        begun = time.monotonic()
        peaks[n] = peak(started(EMBED, folders[0], folders[n], tmp_path / str(n)))
        seconds[n] = time.monotonic() - begun
    with capsys.disabled():
        print("\nembed", {n: f"{peaks[n] / MIB:.0f} MiB, {seconds[n]:.1f} s" for n in peaks})
    # The vectors, 128 bytes an image, and the ids, which a set holds as text.
    assert peaks[MANY] - peaks[FEW] < (MANY - FEW) * 600

    (tmp_path / "killed").mkdir()
    made = kill_at(started(EMBED, folders[0], folders[MANY], tmp_path / "killed"), tmp_path / "killed" / ".work", 6)
    listed = json.loads(next((tmp_path / "killed" / "kept").glob("*.json")).read_text())
    assert len(listed["ids"]) == MANY and 6 <= len(made) < MANY // SHARD
    peak(started(EMBED, folders[0], folders[MANY], tmp_path / "killed"))
    assert (tmp_path / "killed" / "values.npy").read_bytes() == (tmp_path / str(MANY) / "values.npy").read_bytes()
