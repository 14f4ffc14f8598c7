"""Work that runs ahead of the device keeps its order."""

from __future__ import annotations

import contextlib

import pytest
import torch

from dreamteacher.data import batches as data_batches
from dreamteacher.data import image_set
from dreamteacher.data.images import to_float
from dreamteacher.runtime import prefetch
from dreamteacher.runtime.errors import UserError


@pytest.mark.parametrize("threaded", [False, True])
def test_ahead_keeps_the_order_and_raises_in_turn(threaded):
    fetched = []

    def items():
        for i in range(4):
            fetched.append(i)
            yield i
        raise UserError("The disk is gone.", "Look for it.")

    stream = prefetch.prefetch(items(), lambda i: i * i, threaded=threaded)
    assert next(stream)[0] == 0
    assert next(stream)[0] == 1
    assert [next(stream)[0], next(stream)[0]] == [4, 9]
    with pytest.raises(UserError, match="disk"):
        next(stream)
    unfinished = prefetch.prefetch(iter(range(100)), lambda i: i, threaded=threaded)
    next(unfinished)
    unfinished.close()


def test_copies_are_pinned_beside_the_work_and_waited_for_by_the_device_alone(monkeypatch):
    """The calls in their order: what a GPU would do. Nothing makes the host wait."""
    calls: list[str] = []

    class Stream:
        def __init__(self, device=None):
            self.name = "side"

        def record_event(self):
            calls.append(f"event on {self.name}")
            return "event"

        def wait_event(self, event):
            calls.append(f"{self.name} waits for {event}")

    @contextlib.contextmanager
    def within(stream):
        calls.append("begin side")
        yield
        calls.append("end side")

    class Watched(torch.Tensor):
        def pin_memory(self):
            calls.append("pin")
            return self

        def to(self, device, non_blocking=False):
            calls.append(f"copy {device.type} {non_blocking}")
            return self

        def record_stream(self, stream):
            calls.append(f"kept for {stream.name}")

    work = Stream()
    work.name = "work"
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: work)
    copies = prefetch.Copies(torch.device("cuda"))
    sent = copies.send([torch.ones(2).as_subclass(Watched)])
    assert calls == ["begin side", "pin", "copy cuda True", "event on side", "end side"]
    calls.clear()
    copies.receive(sent)
    assert calls == ["work waits for event", "kept for work"]


def test_raw_batches_made_floats_on_the_device_are_the_same_bits(image_folder):
    images = image_set.load_images(image_folder, (64, 64))
    asked = {"batch_size": 4, "seed": 1, "first_step": 0, "last_step": 3, "flip": True}
    for raw, plain in zip(
        data_batches.batches(images, raw=True, **asked), data_batches.batches(images, **asked), strict=True
    ):
        assert raw.images.dtype == torch.uint8
        made = to_float(raw.images, torch.channels_last)
        assert torch.equal(made, plain.images)
        assert made.is_contiguous(memory_format=torch.channels_last)
