import numpy as np
import pytest

from phyla.oddities import find_oddities
from phyla.report import health
from phyla.report.findings import SEVERITIES, Finding


def finding(severity, code="some-check"):
    return Finding(code, f"A {severity} thing", severity, "What.", "Do.")


FINE = finding("passed", "doubtful-clusters")


@pytest.mark.parametrize(("severities", "level", "n_reasons"), [
    (("passed", "note", "not_applicable"), "green", 0), (("passed", "warning"), "amber", 1),
    (("warning", "critical", "note", "critical"), "red", 3)])
def test_the_worst_finding_is_the_verdict_and_notes_are_no_reason(severities, level, n_reasons):
    found = health.judge([FINE, *map(finding, severities)])
    assert (found.level, len(found.reasons)) == (level, n_reasons)
    assert found.word == health.WORDS[level]
    order = [SEVERITIES.index(reason.severity) for reason in found.reasons]
    assert order == sorted(order)


def test_what_could_hardly_be_checked_is_not_called_sound():
    unjudged = finding("not_applicable", "doubtful-clusters")
    found = health.judge([finding("passed"), unjudged])
    assert (found.level, found.reasons) == ("amber", (unjudged,))
    assert health.judge([unjudged, finding("critical")]).level == "red"


def test_findings_come_most_serious_first_and_once_each(make_run):
    data = make_run(empty=(2,), n_clusters=4)
    found = health.all_findings(
        data.assignment, names=[f"Cluster {i}" for i in range(4)], neighbors=data.neighbors, curves=data.curves,
        oddities=find_oddities(data.images, data.neighbors), stability=np.array([0.9, 0.9, np.nan, 0.1]))
    order = [SEVERITIES.index(one.severity) for one in found]
    assert order == sorted(order)
    assert len({one.code for one in found}) == len(found) == 14
    assert all(one.title and one.message for one in found)
    assert all(one.advice for one in found if one.severity in ("critical", "warning", "note"))


def test_the_record_holds_the_verdict_its_reasons_and_every_finding():
    found = [finding("warning", "imbalance"), FINE]
    record = health.health_record(health.judge(found), found)
    assert (record["verdict"], record["reasons"]) == ("amber", ["imbalance"])
    assert record["findings"][0] == {"code": "imbalance", "title": "A warning thing", "severity": "warning",
                                     "message": "What.", "advice": "Do."}
