"""The file of moves: what it may say, and where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from phaul_runtime.batch.model import Batch, attempt_id, find_circle, load_batch, predecessors
from phaul_runtime.errors import ConfigError

GOOD = """\
limits: {total: 4, per_source: 1}
retries: 2
stop_after_failures: 3
order: given
groups:
  shop: {limit: 1, after: [db]}
defaults: {engine: runc, to: ssh://root@b, files: copy}
moves:
  - {target: web, from: ssh://root@a, group: shop}
  - {target: 4711, name: db, engine: process, max_downtime_ms: 500, ignore: [kernel]}
  - target: cache
    after: [db]
    to: ssh://root@c:2222
"""


def load(tmp_path: Path, text: str) -> Batch:
    path = tmp_path / "moves.yaml"
    path.write_text(text)
    return load_batch(path)


def test_a_good_file(tmp_path: Path) -> None:
    batch = load(tmp_path, GOOD)
    web, db, cache = batch.moves
    assert (web.name, web.engine, web.to, web.files) == ("web", "runc", "ssh://root@b", "copy")
    assert (db.name, db.target, db.engine, db.from_) == ("db", "4711", "process", "local:")
    assert (web.source_host, db.source_host, cache.destination_host) == ("a", "local", "c:2222")
    assert predecessors(batch) == {"web": {"db"}, "db": set(), "cache": {"db"}}
    assert batch.limits.per_destination == 2


def test_json_and_back_is_the_same(tmp_path: Path) -> None:
    batch = load(tmp_path, GOOD)
    again = Batch.from_json(batch.to_json())
    assert again == batch
    assert again.digest == batch.digest
    assert load(tmp_path, GOOD.replace("total: 4", "total: 5")).digest != batch.digest


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("retries: 2", "retries: -1", "{path}:2: retries: input should be greater than or equal"),
        ("retries: 2", "retires: 2", "{path}:2: retires: unknown key; did you mean retries?"),
        ("total: 4", "total: 0", "{path}:1: limits.total"),
        ("order: given", "order: best", "{path}:4: order"),
        ("group: shop", "grup: shop", "{path}:9: moves.0.grup: unknown key; did you mean group?"),
        ("group: shop", "group: shops", "{path}:9: moves.0.group: there is no group 'shops'"),
        ("group: shop", "name: shop", "{path}:9: moves.0.name: 'shop' is the name of a group"),
        ("files: copy", "fils: copy", "{path}:7: defaults.fils: unknown key"),
        ("files: copy", "files: move", "{path}:7: defaults.files"),
        ("files: copy", "files: copy, mode: hybird", "{path}:7: defaults.mode: input should be"),
        ("files: copy", "mode: hybrid, restore: full",
         "{path}:9: moves.0.mode: there is no hybrid where restore is full"),
        ("target: web, ", "", "{path}:9: moves.0.target: field required"),
        ("name: db", "name: web", "{path}:10: moves.1: a second move 'web'; the first is"),
        ("name: db", "name: 'd b'", "{path}:10: moves.1.name"),
        ("limit: 1, after: [db]", "after: [bd]", "{path}:6: groups.shop.after: there is no"),
        ("    after: [db]", "    after: [bd]", "{path}:12: moves.2.after: there is no"),
        ("ssh://root@c:2222", "root@c", "{path}:13: moves.2.to: destination 'root@c' names no"),
        ("from: ssh://root@a", "from: tls://a", "{path}:9: moves.0.from: 'tls://a': moves"),
        (", to: ssh://root@b", "", "{path}:9: moves.0: no destination: to: ssh://root@host"),
        ("engine: process,", "engine: process, after: [cache],", "circle: db > cache > db"),
        ("target: 4711, name: db", "target: cache, name: db, to: ssh://d", None),
        ("target: 4711, name: db, engine: process", "target: cache, name: x, to: ssh://d",
         "{path}:11: moves.2: 'cache' and 'x' move the same target from the same host"),
        ("moves:", "moves: []\nx:", "there are no moves"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, says: str | None
) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    if "name: x" in new:
        text = text.replace("[db]", "[]")
    if says is None:
        # The same target twice, one after the other: fine.
        load(tmp_path, text)
        return
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert says.format(path=tmp_path / "moves.yaml") in str(caught.value)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("group: shop", "group: a").replace("[db]\n    to", "[b]\n    to")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert "'a'" in caught.value.message
    assert any("'b'" in line for line in caught.value.log)


def test_circles() -> None:
    assert find_circle({"a": set(), "b": {"a"}, "c": {"a", "b"}}) == []
    assert find_circle({"a": {"a"}}) == ["a", "a"]
    circle = find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()})
    assert circle in (["b", "c", "b"], ["c", "b", "c"])
    # A long chain is none, and no recursion.
    chain = {f"m{n}": {f"m{n + 1}"} if n < 5000 else set[str]() for n in range(5001)}
    assert find_circle(chain) == []


def test_attempt_ids_follow_from_batch_move_and_number() -> None:
    ids = {
        attempt_id(batch, move, number)
        for batch in ("b1", "b2") for move in ("web", "db") for number in (1, 2)
    }  # fmt: skip
    assert len(ids) == 8
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in ids)
    # Of the programs before this one too: a batch that was begun is asked for by them.
    assert attempt_id("b1", "web", 1) == "97c225a89b05ed15"
