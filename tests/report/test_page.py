import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

import phyla
from phyla.errors import InputError, StorageError
from phyla.evaluate.robustness import Attack, RobustnessCurve
from phyla.report.page import build_report
from phyla.types import Assignment, ImageSet, Neighbors, Scores

VOID = {"meta", "link", "img", "br", "input"}


class Reader(HTMLParser):
    """Reads a page: its text, the attributes of its tags, and whether they close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(path):
    return Reader(path.read_text(encoding="utf-8"))


def test_page_of_a_labelled_run(make_run, tmp_path):
    data = make_run(more={"notices": ["SCAN kept: better neighbor score"],
                          "skipped": [("bad & <b>.jpg", "zero bytes")]})
    path = build_report(data, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert {p.name for p in path.parent.iterdir()} == {"report.html", "map.png", "prototypes.png", "confidence.png",
                                                       "curves.png", "confusion_matrix.png", "retrieval.png",
                                                       "probabilities.png", "reliability.png", "risk_coverage.png",
                                                       "health.json", "oddities.csv"}
    page = read(path)
    assert "60 images in 3 clusters" in page.text
    assert f"({data.assignment.confidence.mean():.2f})" in page.text
    assert "100 % of the images are in the cluster that matches their class" in page.text
    for words in ("kind 2", "scan-test", "12.2 s", "cluster.n", "SCAN kept", "bad & <b>.jpg", "zero bytes", "0.500",
                  "Findings", f"phyla {phyla.__version__}", "folder/image 0.png"):
        assert words in page.text, words
    for cluster in range(3):
        assert sum(attrs.get("id") == f"cluster-{cluster}" for _, attrs in page.tags) == 1


def test_page_without_labels_neighbors_curves_scores(make_run, tmp_path):
    data = make_run(with_truth=False, with_neighbors=False, with_curves=False, more={"scores": [], "run": {}})
    path = build_report(data, tmp_path)
    page = read(path)
    assert not (tmp_path / "confusion_matrix.png").exists()
    assert "true labels" not in page.text.lower().replace("this needs true labels", "")
    assert "60 images in 3 clusters" in page.text
    ids = {attrs["id"] for _, attrs in page.tags if attrs.get("id")}
    assert {"findings", "clusters", "map", "confidence", "run", "reading"} <= ids
    assert ids.isdisjoint({"truth", "training", "scores", "calibration", "robustness"})
    assert {path.name for path in tmp_path.iterdir()}.isdisjoint({"reliability.png", "risk_coverage.png",
                                                                  "robustness.png"})


def section(path):
    return re.search(r'<section id="examples".*?</section>', path.read_text(encoding="utf-8"), flags=re.S)[0]


def test_examples_with_labels_name_classes(make_run, tmp_path):
    truth = np.arange(60) % 3
    truth[:30] = 2 - truth[:30]  # so that some neighbors in a cluster are of another class
    names = ["cat & co", "dog", "emu"]
    part = section(build_report(make_run(more={"truth": (truth, names)}), tmp_path))
    page = Reader(part)
    shown = [attrs for tag, attrs in page.tags if tag == "article"]
    assert len(shown) == 7  # three prototypes, four images that are hard
    assert sum(attrs.get("class") == "other" for tag, attrs in page.tags if tag == "figure") == part.count("≠ ") - 1 > 0
    assert page.text.count("Classes, by its neighbors") == 7
    assert "cat & co" in page.text
    assert "a vote of the 2 nearest images" in page.text
    assert "true class" in page.text
    assert sum(attrs.get("alt", "").startswith("Neighbor 2: ") for tag, attrs in page.tags if tag == "img") == 7


def test_examples_without_labels_and_without_neighbors(make_run, tmp_path):
    part = section(build_report(make_run(with_truth=False), tmp_path / "a"))
    assert "in another cluster" in part
    assert "class=\"differs\"" not in part  # the neighbors made up are all of the same cluster
    assert "Classes" not in part
    part = section(build_report(make_run(with_truth=False, with_neighbors=False), tmp_path / "b"))
    assert "look-alikes" not in part
    assert "Neighbor" not in part
    assert "Cluster 2" in part
    assert (tmp_path / "a" / "retrieval.png").exists()
    assert not (tmp_path / "b" / "retrieval.png").exists()
    assert (tmp_path / "b" / "probabilities.png").exists()


def test_examples_of_a_certain_run_are_typical_only_and_show_bars_that_have_length(make_run, tmp_path):
    page = Reader(section(build_report(make_run(certain=True, empty=(1,)), tmp_path)))
    assert "Least certain" not in page.text
    assert "torn" not in page.text
    assert [attrs["style"] for tag, attrs in page.tags if tag == "i"] == ["--v:100.0"] * 4  # two examples


def test_all_unknown_labels_are_no_labels(make_run, tmp_path):
    path = build_report(make_run(more={"truth": (np.full(60, -1), ["a"])}), tmp_path)
    assert not (tmp_path / "confusion_matrix.png").exists()
    assert not (tmp_path / "reliability.png").exists()
    assert 'id="calibration"' not in path.read_text(encoding="utf-8")


def before_and_after(data):
    """Two results, the first surer than the one that the page shows, and their curves under two attacks."""
    p = data.assignment.probabilities.astype(np.float64) ** 3
    surer = Assignment((p / p.sum(axis=1, keepdims=True)).astype(np.float32), data.images.ids)
    curves = [RobustnessCurve(title, attack, (0.0, 4 / 255, 8 / 255), (1.0, 0.8, low), (0.9, 0.7, low), 20, 20, "test")
              for attack in (Attack("pgd"), Attack("fgsm")) for title, low in (("SCAN", 0.3), ("SCAN + RUC", 0.6))]
    return replace(data, results={"SCAN": surer, "SCAN + RUC": data.assignment}, robustness=curves)


def part_of(path, name):
    return Reader(re.search(rf'<section id="{name}".*?</section>', path.read_text(encoding="utf-8"), flags=re.S)[0])


def test_results_stand_side_by_side_and_under_attack(make_run, tmp_path):
    data = before_and_after(make_run())
    path = build_report(data, tmp_path)
    honest, attacked = part_of(path, "calibration"), part_of(path, "robustness")
    assert honest.text.index("SCAN") < honest.text.index("SCAN + RUC")
    drawn = [attrs["aria-label"] for _, attrs in honest.tags if attrs.get("class") == "area"]
    assert [words.split(":")[0] for words in drawn[:2]] == ["Reliability of SCAN", "Reliability of SCAN + RUC"]
    assert sum(attrs.get("class") == "honesty" for _, attrs in honest.tags) == 2
    means = [f"{a.confidence.mean(dtype=np.float64):.3f}" for a in data.results.values()]
    assert all(mean in honest.text for mean in means)
    assert "promises too little" in honest.text.lower()
    assert sum(tag == "polyline" for tag, _ in honest.tags) == 2
    assert sum(tag == "polyline" for tag, _ in attacked.tags) == 4
    assert "20 images of the split “test” were attacked" in attacked.text
    assert "PGD, 10 steps of epsilon / 4" in attacked.text
    assert "8/255" in attacked.text
    for name in ("reliability", "risk_coverage", "robustness"):
        assert (tmp_path / f"{name}.png").stat().st_size < 300_000
    page = read(path)
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    assert {attrs.get("href") for tag, attrs in page.tags if tag == "a"} >= {"#calibration", "#robustness"}
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for tag, attrs in page.tags if tag == "svg")


def test_results_without_labels_show_confidence_alone(make_run, tmp_path):
    data = before_and_after(make_run(with_truth=False))
    curves = [replace(curve, correct=None, n_known=0) for curve in data.robustness]
    path = build_report(replace(data, robustness=curves), tmp_path)
    honest, attacked = part_of(path, "calibration"), part_of(path, "robustness")
    assert "cannot be drawn without labels" in honest.text
    assert not any(attrs.get("class") in ("area", "honesty") for _, attrs in honest.tags)
    assert sum(attrs.get("class") == "bins" for _, attrs in honest.tags) == 2
    assert "keep their cluster" in attacked.text
    assert "Drop" not in [word.strip() for word in attacked.words]
    assert not (tmp_path / "reliability.png").exists()
    assert (tmp_path / "confidence.png").exists()
    assert (tmp_path / "robustness.png").exists()


def test_one_labelled_result_is_called_as_in_the_table(make_run, tmp_path):
    honest = part_of(build_report(make_run(), tmp_path), "calibration")
    assert "SCAN: confidence bin by bin" in honest.text
    assert "This result" not in honest.text
    assert sum(attrs.get("class") == "honesty" for _, attrs in honest.tags) == 1


def test_more_clusters_than_classes_are_told(make_run, tmp_path):
    path = build_report(make_run(more={"truth": (np.arange(60) % 2, ["a", "b"])}), tmp_path)
    assert "more clusters than classes" in part_of(path, "calibration").text


def test_page_loads_nothing_and_links_lead_somewhere(make_run, tmp_path):
    path = build_report(make_run(), tmp_path)
    page = read(path)
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            address = attrs.get(name)
            if address is None:
                continue
            assert address.startswith(("data:", "#")), (tag, address[:60])
            if address.startswith("#"):
                assert address[1:] in ids, address
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[^\"')]*|<script>.*?</script>", "", text, flags=re.S))
    assert "http" not in re.search(r"<script>(.*?)</script>", text, flags=re.S)[1]
    assert not re.findall(r"url\((?!data:)", text)
    assert "@import" not in text


def test_page_can_be_read_without_scripts_and_by_a_reader(make_run, tmp_path):
    page = read(build_report(make_run(), tmp_path))
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")
    assert sum(tag == "table" for tag, _ in page.tags) == sum(tag == "caption" for tag, _ in page.tags)
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for tag, attrs in page.tags if tag == "svg")
    assert dict(page.tags)["html"] == {"lang": "en"}
    assert [tag for tag, _ in page.tags if tag == "h1"] == ["h1"]
    badges = [attrs for _, attrs in page.tags if attrs.get("class") == "badge"]
    assert len(badges) == 15  # the verdict and 14 findings
    assert all(attrs["data-sign"] for attrs in badges)  # severity is told by a sign and a word, not by colour alone


def test_names_are_escaped(make_run, tmp_path):
    nasty = "<script>alert('x')</script>\"'&{{ 7 * 7 }}\n$é漢"
    ids = [f"{nasty}{i}" for i in range(60)]
    data = make_run()
    data = replace(data, title=nasty, images=ImageSet(data.images.pixels, ids),
                   assignment=Assignment(data.assignment.probabilities, ids), cluster_names=[nasty, "b", "c"],
                   truth=(data.truth[0], [nasty, "x", "y"]), skipped=[(nasty, nasty)],
                   notices=[nasty], run={nasty: {nasty: nasty}}, scores=[Scores(nasty, nasty, 60, {nasty: 0.5})],
                   curves=[{"stage": nasty, "epoch": 1, nasty: 1.0}],
                   results={nasty: Assignment(data.assignment.probabilities, ids)},
                   robustness=[RobustnessCurve(nasty, Attack(), (0.0, 0.1), (1.0, 0.5), None, 9, 0)])
    path = build_report(data, tmp_path)
    page = read(path)
    text = path.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert "49" not in page.text.split("Reading this page")[0].split(" images in ")[0]
    assert "{{ 7 * 7 }}" in page.text
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]


def test_cluster_pictures_are_of_that_cluster_only(make_run, tmp_path):
    data = make_run(n_images=30)
    page = build_report(data, tmp_path).read_text(encoding="utf-8")
    labels = dict(zip(data.images.ids, data.assignment.labels.tolist(), strict=True))
    for cluster in range(3):
        card = re.search(rf'id="cluster-{cluster}">(.*?)</details>', page, flags=re.S)[1]
        shown = re.findall(r'<img[^>]* alt="([^"]*)"', card)
        assert len(shown) == len(set(shown)) == 9  # ten members, one of them the prototype in the heading
        assert {labels[name] for name in shown} == {cluster}


@pytest.mark.parametrize("asked", [
    {"n_images": 3, "n_clusters": 3}, {"n_images": 1, "n_clusters": 1}, {"n_images": 2, "n_clusters": 5},
    {"n_images": 31, "n_clusters": 1}, {"n_images": 9, "empty": (0, 2)}, {"n_images": 9, "size": (1, 1)},
    {"n_images": 9, "size": (20, 50)}, {"n_images": 9, "certain": True}, {"n_images": 9, "n_features": 1}])
def test_page_of_odd_runs(make_run, tmp_path, asked):
    path = build_report(make_run(**asked), tmp_path)
    assert f"{asked['n_images']} image" in read(path).text


@pytest.mark.parametrize(("n_images", "n_clusters"), [(29, 27), pytest.param(3000, 200, marks=pytest.mark.slow)])
def test_page_of_many_clusters_stays_small(make_run, tmp_path, n_images, n_clusters):
    data = make_run(n_images=n_images, n_clusters=n_clusters, size=(96, 96), with_neighbors=False)
    path = build_report(data, tmp_path)
    assert path.stat().st_size < 20_000_000
    assert all(png.stat().st_size < 300_000 for png in tmp_path.glob("*.png"))
    page = read(path)
    assert sum(attrs.get("class") == "heat" for _, attrs in page.tags) == 1
    assert not any(tag == "details" and "open" in attrs and attrs.get("class") == "card" for tag, attrs in page.tags)


def test_same_input_same_page(make_run, tmp_path):
    one, two = (build_report(make_run(), tmp_path / name).read_bytes() for name in ("a", "b"))
    assert one == two


def test_pixels_may_lie_on_disk_and_only_some_are_read(make_run, tmp_path):
    data = make_run()
    np.save(tmp_path / "pixels.npy", data.images.array)
    mapped = ImageSet(np.load(tmp_path / "pixels.npy", mmap_mode="r"), data.images.ids)
    one = build_report(data, tmp_path / "a").read_bytes()
    assert build_report(replace(data, images=mapped), tmp_path / "b").read_bytes() == one


def test_what_does_not_fit_together_is_refused(make_run, tmp_path):
    data = make_run()
    wrong = {"embeddings": data.embeddings[:-1], "truth": (np.zeros(3, int), ["a"]),
             "neighbors": Neighbors(np.array([[1], [0]]), np.zeros((2, 1), np.float32)), "cluster_names": ["only one"],
             "assignment": Assignment(data.assignment.probabilities, data.images.ids[::-1])}
    for name, value in wrong.items():
        with pytest.raises(InputError):
            build_report(replace(data, **{name: value}), tmp_path / name)
    broken = data.embeddings.copy()
    broken[3] = np.nan
    with pytest.raises(InputError, match="finite"):
        build_report(replace(data, embeddings=broken), tmp_path)
    with pytest.raises(InputError, match="images and SCAN name different images"):
        build_report(replace(data, results={"SCAN": wrong["assignment"]}), tmp_path)
    none = ImageSet(data.images.pixels[:0], [])
    with pytest.raises(InputError, match="0 images"):
        build_report(replace(data, images=none, assignment=Assignment(data.assignment.probabilities[:0], [])), tmp_path)
    assert not list(tmp_path.glob("**/report.html"))


def test_a_place_that_cannot_be_written_is_named(make_run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        build_report(make_run(n_images=6), tmp_path / "file")




def alike(n, similarity):
    """Neighbors of which the first two images are each other's at ``similarity``, all others at 0.5."""
    rows = np.arange(n)
    near = Neighbors(np.where(rows == 1, 0, np.where(rows == 0, 1, (rows + 1) % n))[:, None],
                     np.full((n, 1), 0.5, np.float32))
    near.similarities[:2] = similarity
    return near


def test_verdict_stands_at_the_top_with_its_reasons_and_in_a_file(make_run, tmp_path):
    build_report(make_run(), tmp_path / "green")
    page, told = read(tmp_path / "green" / "report.html"), json.loads((tmp_path / "green" / "health.json").read_text())
    assert told["verdict"] == "green"
    assert "Sound No check found a fault" in page.text
    unstable = {"stability": np.array([0.2, 0.9, 0.9]), "agreement": np.full(60, 0.4)}
    build_report(make_run(more=unstable), tmp_path / "amber")
    page, told = read(tmp_path / "amber" / "report.html"), json.loads((tmp_path / "amber" / "health.json").read_text())
    assert (told["verdict"], told["reasons"]) == ("amber", ["unstable-clusters"])
    assert "Use with care" in page.text
    assert page.text.index("Unstable clusters") < page.text.index("Clusters in use")
    assert sum(attrs.get("href") == "#finding-unstable-clusters" for tag, attrs in page.tags if tag == "a") == 1
    codes = {attrs["id"] for _, attrs in page.tags if str(attrs.get("id")).startswith("finding-")}
    assert codes == {f"finding-{finding['code']}" for finding in told["findings"]}


def test_odd_images_are_shown_and_in_a_table(make_run, tmp_path):
    data = make_run(with_truth=False)
    pixels = np.array(data.images.pixels)
    pixels[7] = pixels[9]
    pixels[11] = 30
    near = alike(60, 0.99)
    near.similarities[20] = -0.9
    data = replace(data, images=ImageSet(pixels, data.images.ids, "made"), neighbors=near)
    page = read(build_report(data, tmp_path))
    ids = {attrs["id"] for _, attrs in page.tags if attrs.get("id")}
    assert {"review", "doubtful", "outliers", "copies", "blank"} <= ids
    assert "2 images, equal to the pixel" in page.text
    assert "2 images, nearly the same, in several clusters" in page.text
    rows = list(csv.DictReader((tmp_path / "oddities.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["id"] for row in rows] == list(data.images.ids)
    assert [i for i, row in enumerate(rows) if row["outlier"] == "true"] == [20]
    assert [i for i, row in enumerate(rows) if row["identical_group"]] == [7, 9]
    assert {i: row["duplicate_group"] for i, row in enumerate(rows) if row["duplicate_group"]} == {
        0: "0", 1: "0", 7: "1", 9: "1"}
    assert [i for i, row in enumerate(rows) if row["hint"] == "blank"] == [11]
    assert {row["agreement"] for row in rows} == {""}


def test_images_left_open_are_counted(make_run, tmp_path):
    data = make_run()
    least = float(np.median(data.assignment.confidence))
    page = read(build_report(replace(data, min_confidence=least), tmp_path / "a"))
    assert f"Unsure {int((data.assignment.confidence < least).sum())} below {least:.2f}" in page.text
    assert "in no cluster of the tables" not in read(build_report(data, tmp_path / "b")).text


def test_pixels_of_very_many_images_are_not_looked_at(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr("phyla.report.page.LOOK_AT_MOST", 59)
    page = read(build_report(make_run(), tmp_path))
    assert "The pixels of so many images were not looked at." in page.text
    assert "sharpness" in (tmp_path / "oddities.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "value"), [("stability", np.ones(2)), ("agreement", np.ones(59))])
def test_stability_and_agreement_are_of_these_clusters_and_images(make_run, tmp_path, name, value):
    with pytest.raises(InputError, match=f"needs {name} of as many"):
        build_report(make_run(more={name: value}), tmp_path)
