"""When a step is launched as it is, when it is recorded, and when the record is replayed."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib import cuda_graphs

CPU = torch.device("cpu")


@pytest.fixture
def log(monkeypatch):
    """What happens to the step, in a stand-in for CUDA that records nothing."""
    log = []

    @contextlib.contextmanager
    def recording(graph, stream):
        log.append("record")
        yield

    stream = SimpleNamespace(device=CPU, wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    return log


def test_a_step_is_recorded_after_a_few_and_again_where_it_changes(log):
    def step(rows, progress):
        log.append("step")
        return rows

    graphed = cuda_graphs.GraphedStep(step, CPU, changes_at=(0.5,))
    one_phase = ["step"] * cuda_graphs.WARM_UP + ["record", "step", "replay", "replay"]
    for start in (0.0, 0.5):
        for i in range(5):
            assert graphed(np.array([i, 7]), start + 0.1 * i).tolist() == [i, 7]
        assert log == one_phase
        log.clear()
