"""watchit: the same clips everywhere, balanced answers, and no answer in a single frame."""

from __future__ import annotations

import zlib
from collections import Counter

import numpy as np
import pytest
from tokprune.eval.tasks import findit, load_task, watchit

from tokprune.prune.videos import Clip

N_CLIPS = 400
CHECKSUM = 2879252106


@pytest.fixture(scope="module")
def actors() -> list[list[watchit.Actor]]:
    return [watchit.draw("validation", i)[1] for i in range(N_CLIPS)]


@pytest.fixture(scope="module")
def samples():
    return watchit.WatchIt("validation", N_CLIPS).samples()


def test_the_same_clips_and_questions_everywhere():
    frames = np.stack([watchit.draw("test", i)[0] for i in range(5)])
    asked = "|".join(f"{s.id} {s.question} {s.answer}" for s in watchit.WatchIt("test", 40).samples())
    assert zlib.crc32(frames.tobytes() + asked.encode()) == CHECKSUM


def test_splits_share_no_clip():
    first = [watchit.draw(split, 0)[0] for split in ("train", "validation", "test")]
    assert not any(np.array_equal(a, b) for a, b in zip(first, first[1:] + first[:1], strict=True))


def test_a_clip_is_eight_frames_of_64_pixels():
    task = load_task("watchit")
    sample = task.samples()[0]
    clip = task.image(sample.image_id)
    assert isinstance(clip, Clip)
    assert (len(clip.frames), clip.size, clip.fps) == (8, (64, 64), 2.0)
    assert all(frame.mode == "RGB" for frame in clip.frames)
    assert task.image(sample.image_id) is clip
    frames = watchit.draw("test", int(sample.image_id.split("-")[1]))[0]
    assert np.array_equal(np.stack([np.asarray(f) for f in clip.frames]), frames)


def test_half_of_the_clips_stand_on_a_still_background(actors):
    """Where nothing is drawn at all, the frames of a still clip are equal."""
    still = 0
    for i in range(60):
        frames, cast = watchit.draw("validation", i)
        covered = np.zeros(frames.shape[1:3], bool)
        for actor in cast:
            for x, y, w in actor.boxes:
                covered[y : y + w, x : x + w] = True
        still += bool((frames == frames[0])[:, ~covered].all())
    assert 15 < still < 45


def test_every_clip_has_a_mover_two_that_stay_and_one_or_two_that_come(actors):
    for cast in actors:
        assert sum(a.moves for a in cast) == 1
        assert sum(not a.moves and not a.begins for a in cast) == 2
        assert sum(a.begins > 0 for a in cast) in (1, 2)
        assert len({(a.kind, a.colour) for a in cast}) == len(cast)


def test_pixels_show_what_the_cast_says():
    """The colour at the middle of a full square, a circle or a cross, by hand."""
    seen = Counter()
    for i in range(80):
        frames, cast = watchit.draw("validation", i)
        for actor in cast:
            if actor.kind not in ("circle", "square", "cross") or actor.faint:
                continue
            for frame in range(8):
                x, y = (v + actor.width // 2 for v in actor.at(frame))
                middle = frames[frame, y, x].astype(float)
                away = np.abs(middle - findit.COLOURS[actor.colour]).max()
                shown = frame > actor.begins or actor.begins == 0
                assert away < 20 or not shown
                seen[shown, away < 20] += 1
    assert seen[True, True] > 500
    assert seen[False, True] < 0.15 * seen[False, False]


def test_answers_follow_from_the_cast(actors, samples):
    by_clip = {f"validation-{i}": cast for i, cast in enumerate(actors)}
    for s in samples:
        cast = by_clip[s.image_id]
        (mover,) = [a for a in cast if a.at(0) != a.at(7)]
        late = sorted((a for a in cast if a.opacity(0) == 0), key=lambda a: sum(a.opacity(f) > 0 for f in range(8)))
        if s.kind == "count":
            assert s.question == f"how many frames show the {late[0].colour} {late[0].kind}?"
            assert int(s.answer) == sum(late[0].opacity(f) > 0 for f in range(8)) <= 4
            continue
        subject = mover if s.kind == "moved" else late[0]
        assert len(late) == {"moved": len(late), "appeared": 1, "last": 2}[s.kind]
        assert s.answer == (subject.colour if "color" in s.question else subject.kind)


def test_all_kinds_are_asked_and_ids_are_unique(samples):
    kinds = Counter(s.kind for s in samples)
    assert set(kinds) == set(watchit.KINDS)
    assert min(kinds.values()) > 0.4 * N_CLIPS
    assert len({s.id for s in samples}) == len(samples)


def test_answers_are_balanced(samples):
    """The most frequent answer to a question, learned on other clips, is rarely right."""
    asked: dict[str, Counter] = {}
    for s in watchit.WatchIt("train", 2 * N_CLIPS).samples():
        asked.setdefault(s.question, Counter())[s.answer] += 1
    right = {kind: [] for kind in watchit.KINDS}
    for s in samples:
        guess = asked[s.question].most_common(1)[0][0] if s.question in asked else None
        right[s.kind].append(guess == s.answer)
    shares = {kind: np.mean(r) for kind, r in right.items()}
    assert max(shares.values()) < 0.36, shares


def test_no_single_frame_answers(actors, samples):
    """What a frame shows allows several answers: those who stay might be the mover or the latecomer.

    In every frame before the last shape comes, the answer about it is not there at all. From then on, three shapes or
    more are there that could have come, and its first, faint frame looks like those that are faint all the time.
    """
    faint = Counter()
    for cast in actors:
        late = [a for a in cast if a.begins]
        for frame in range(8):
            shown = [a for a in cast if a.opacity(frame)]
            assert len(shown) >= 3
            for a in shown:
                if a.opacity(frame) < 1:
                    faint["comes" if a.begins else "stays"] += 1
        assert all(a.opacity(0) == 0 for a in late)
        assert all(a.opacity(7) > 0 for a in cast)
    assert faint["stays"] > 4 * faint["comes"]


def test_the_first_frame_alone_is_a_poor_guess(actors, samples):
    """Knowing all of the first frame: the mover is one of three, and what comes is not there."""
    by_clip = {f"validation-{i}": cast for i, cast in enumerate(actors)}
    there = [
        s.answer in {v for a in by_clip[s.image_id] if a.opacity(0) for v in (a.colour, a.kind)}
        for s in samples
        if s.kind in ("appeared", "last")
    ]
    assert np.mean(there) < 0.6  # neither always among the first shapes nor never
    assert np.mean(there) > 0.2
