"""A torch.cuda without a GPU, whose streams run late and in any order relative to each other.

An operation on a `Late` tensor is not computed but queued on the current stream; until it runs, memory holds `GARBAGE`.
A stream runs in order and stops at an event that has not happened. A test chooses when streams run: `eager` streams as
soon as possible, other streams only when the host waits for them. A GPU may run in each of these orders, so a missing
wait gives wrong data. Freed memory is given to the next user at once, as the caching allocator would do. `forget` omits
one rule of prefetch.py on purpose.
"""

import random
import weakref
from collections import defaultdict, deque
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_map_only

from handsoff_stream import prefetch as module
from handsoff_stream.batch import LabelledBatch

GARBAGE = -77


def numbered(device):
    return torch.device("cuda", torch.device(device).index or 0)


class Event:
    def __init__(self, stream):
        self.stream, self.happened = stream, False

    def query(self):
        return self.happened

    def synchronize(self):
        if "host waits" not in self.stream.cuda.forget:
            self.stream.cuda.force(self)


class Stream:
    def __init__(self, cuda, name, device="cuda:0"):
        self.cuda, self.name, self.device, self.queue = cuda, name, numbered(device), deque()
        cuda.streams.append(self)

    def enqueue(self, work):
        self.queue.append(work)
        self.cuda.settle()

    def record_event(self):
        event = Event(self)
        self.enqueue(event)
        return event

    def wait_event(self, event):
        if f"{self.name} waits" not in self.cuda.forget:
            self.enqueue(("wait", event))

    def wait_stream(self, other):
        if "weights" not in self.cuda.forget:
            self.enqueue(("wait", other.record_event()))

    def stuck(self):
        return isinstance(self.queue[0], tuple) and not self.queue[0][1].happened

    def step(self):
        work = self.queue.popleft()
        if isinstance(work, Event):
            work.happened = True
        elif callable(work):
            work()


class LateCuda:
    """`eager(stream)` says whether a stream works as soon as it can; called anew at every step."""

    def __init__(self, eager=lambda stream: False, forget=""):
        self.eager, self.forget = eager, forget
        self.streams, self.current, self.claims = [], {}, defaultdict(list)
        self.allocated = 0
        for device in ("cuda:0", "cuda:1"):
            self.current[torch.device(device)] = Stream(self, "consumer", device)

    def settle(self):
        """Eager streams work until none of them can."""
        while ready := [s for s in self.streams if s.queue and not s.stuck() and self.eager(s)]:
            ready[0].step()

    def force(self, event):
        """Only what has to happen before the event."""
        while not event.happened:
            if event.stream.stuck():
                self.force(event.stream.queue[0][1])
            event.stream.step()

    def drain(self):
        """What is left, a side stream before the consumers that came after it."""
        self.eager = lambda stream: True
        self.settle()

    @contextmanager
    def stream(self, stream):
        before, self.current[stream.device] = self.current[stream.device], stream
        yield
        self.current[stream.device] = before

    def late(self, memory, device="cuda:0"):
        return Late(memory, self, numbered(device))

    def upload(self, tensor, device="cuda:0"):
        """A tensor on its way to the device."""
        return torch.add(self.late(torch.zeros_like(tensor), device), tensor)

    def empty_like(self, tensor, device):
        """Takes the place of prefetch's `_empty_like`."""
        memory = torch.full(tensor.shape, GARBAGE, dtype=tensor.dtype)
        if device.type == "cpu":
            return memory
        self.allocated += 1
        late = Late(memory, self, device)
        weakref.finalize(late, self.free, memory, self.current[device]).atexit = False
        return late

    def free(self, memory, owner):
        """The allocator: the owner's next work may overwrite it, once the streams that claimed it have passed."""
        for stream in self.claims.pop(id(memory), []):
            owner.enqueue(("wait", stream.record_event()))
        owner.enqueue(lambda: memory.fill_(GARBAGE))

    def claim(self, batch, stream):
        for tensor in batch.tensors():
            if "allocator" not in self.forget:
                self.claims[id(tensor.memory)].append(stream)

    def patch(self, monkeypatch):
        fakes = {
            "Stream": lambda device, priority: Stream(self, "side", device),
            "stream": self.stream,
            "current_stream": lambda device: self.current[numbered(device)],
            "current_device": lambda: 0,
            "is_available": lambda: True,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(module, "_empty_like", self.empty_like)
        monkeypatch.setattr(module, "_streams", {})
        monkeypatch.setattr(LabelledBatch, "record_stream", lambda batch, stream: self.claim(batch, stream))


class Late(torch.Tensor):
    """A tensor whose operations are enqueued; `memory` is what a careless reader would see."""

    @staticmethod
    def __new__(cls, memory, cuda, device):
        self = torch.Tensor._make_wrapper_subclass(cls, memory.shape, strides=memory.stride(), dtype=memory.dtype)
        self.memory, self.cuda, self.on = memory, cuda, device
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        first = next(t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Late))
        cuda, on = first.cuda, first.on
        (raw, options) = tree_map_only(Late, lambda t: t.memory, (args, kwargs or {}))
        returns = func._schema.returns[0].alias_info
        if returns is not None and not returns.is_write:  # a view
            return Late(func(*raw, **options), cuda, on)
        if func._schema.is_mutable:
            if func is torch.ops.aten.copy_.default and isinstance(args[0], Late) and args[0].on != args[1].on:
                return copy_between(args[0], args[1])
            cuda.current[on].enqueue(lambda: func(*raw, **options))
            return args[0]
        result = torch.full_like(func(*raw, **options), GARBAGE)
        cuda.current[on].enqueue(lambda: result.copy_(func(*raw, **options)))
        return Late(result, cuda, on)


def copy_between(target, source):
    """As PyTorch does it: on the source's current stream, and both current streams wait for each other."""
    there, here = source.cuda.current[target.on], source.cuda.current[source.on]
    here.enqueue(("wait", there.record_event()))
    here.enqueue(lambda: target.memory.copy_(source.memory))
    there.enqueue(("wait", here.record_event()))
    return target


def at_random(seed):
    """Any stream, at any time."""
    dice = random.Random(seed)
    return lambda stream: dice.random() < 0.5


POLICIES = {
    "everything late": lambda: lambda stream: False,
    "synthesis first": lambda: lambda stream: stream.name == "side",
    "consumer first": lambda: lambda stream: stream.name == "consumer",
    "everything at once": lambda: lambda stream: True,
    **{f"random {seed}": lambda seed=seed: at_random(seed) for seed in range(5)},
}
