"""Random searches of a running service against the plain filter, also after instances were replaced and deleted."""

from __future__ import annotations

from random import Random
from urllib.parse import urlencode

from tests.http.dicomweb.conftest import Web
from tests.support.search_data import CLASSES, ROUTES, SOUND, STORED, file_of, row_of
from tests.support.search_oracle import ATTRIBUTES, INSTANCE, SERIES, STUDY, Archive, Instance
from tests.support.search_place import Query, Wish

_NAMES = {STUDY: "studies", SERIES: "series", INSTANCE: "instances"}
_PATHS = ("", "/studies/{}", "/studies/{}/series/{}")


def random_instance(randomness: Random) -> Instance:
    keywords = [keyword for keyword in STORED if ATTRIBUTES[keyword].vr != "CS"]
    values = {
        keyword: randomness.choice(SOUND[ATTRIBUTES[keyword].vr])
        for keyword in randomness.sample(keywords, 9)
        if keyword != "PatientID"
    }
    values |= {
        "SOPClassUID": randomness.choice(CLASSES),
        "PatientID": randomness.choice(("A", "B", "a")),
        "Modality": randomness.choice(SOUND["CS"]),
    }
    steps = SOUND["SH"]
    requests = [(randomness.choice(steps), randomness.choice(steps)) for _ in range(randomness.randrange(3))]
    study, series, sop = randomness.randrange(6), randomness.randrange(3), randomness.randrange(8)
    return Instance(f"1.5.{study}", f"1.6.{study}.{series}", f"1.7.{sop}", values, tuple(requests))


def test_a_service_finds_what_a_plain_filter_finds(web: Web) -> None:
    randomness, archive = Random(11), Archive()
    hits = 0
    for _ in range(4):
        for method, count in (("POST", 12), ("PUT", 4)):
            batch = {each.uids: each for each in (random_instance(randomness) for _ in range(count))}
            answer = web.store(*map(file_of, batch.values()), method=method)
            assert answer.status_code in (200, 202)
            for instance in batch.values():
                archive.store(instance, may_replace=method == "PUT")
        gone = randomness.choice(archive.live)
        web.client.delete(f"/v2/studies/{gone.study}/series/{gone.series}").raise_for_status()
        archive.delete(gone.study, gone.series)
        for _ in range(60):
            picks = [(randomness.randrange(60), randomness.randrange(60)) for _ in range(randomness.randrange(4))]
            wish = Wish(randomness.choice(ROUTES), randomness.randrange(60), randomness.randrange(60), picks, 200, 0)
            query = wish.of(archive)
            rows = archive.search(query.level, query.scope, query.filters, is_fuzzy=query.is_fuzzy)
            assert found(web, query) == rows, query
            hits += bool(query.filters and rows)
    assert hits > 80


def found(web: Web, query: Query) -> list[object]:
    path = _PATHS[len(query.scope)].format(*query.scope)
    answer = web.client.get(f"{path}/{_NAMES[query.level]}?{urlencode(query.parameters())}")
    return [row_of(query.level, each) for each in answer.raise_for_status().json()] if answer.content else []
