"""A short form of every kind of fault; `python -m tests.faults` is the long one."""

import pytest

from tests.faults import damage, disks, inputs, kills
from tests.faults.world import World, content


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(world):
    counts = kills.kill(world, 6, seed=1)
    assert counts["kills"] >= 6 and counts["runs"] == counts["equal runs"]
    lost = ("lost epochs", "unloadable folders", "strange exits", "slow exits")
    assert not any(counts[name] for name in lost), counts


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_death_before_any_change_of_the_disk_loses_nothing(world, stage):
    for number in range(1, 200, 9):
        folder = world.root / "every" / f"{stage}{number}"
        body = world.stage(stage, folder)
        kills.wait(
            kills.run_apart(lambda n=number, b=body: (kills.die_before(n)(), b()), world.log)
        )
        assert not folder.exists() or not kills.flaws(folder)
        assert world.finish(body) == 0, world.told()
        assert content(folder) == content(world.whole(stage)), number


@pytest.mark.slow
def test_no_flipped_byte_is_read_as_if_it_were_right(world):
    assert damage.flip(world, 40) == {"flips": 40}


@pytest.mark.slow
def test_no_number_that_is_not_finite_is_written(world):
    counts = damage.plant(world, 4)
    assert +counts == {"planted": 4}


@pytest.mark.slow
def test_bad_commands_end_in_one_line(world):
    counts = inputs.misuse(world)
    assert counts["bad inputs"] >= 60 and +counts == {"bad inputs": counts["bad inputs"]}


@pytest.mark.slow
def test_strange_rows_are_dropped_and_counted(tmp_path):
    assert +inputs.fuzz(tmp_path, 300) == {"rows": 300}


def test_no_text_becomes_an_end_of_sequence(world):
    assert +inputs.inject(world, 500) == {"texts": 500}


@pytest.mark.slow
@pytest.mark.skipif(bool(disks.reason_to_skip()), reason=disks.reason_to_skip() or "-")
def test_runs_recover_from_full_disks(world):
    counts = disks.fill(world, 4)
    assert counts["recovered"] == 4 and counts["stopped"] > 0 and not counts["not one line"]
