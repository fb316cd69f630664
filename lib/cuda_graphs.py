"""A training step as one CUDA graph (CUDA programming guide, "CUDA graphs").

A step of a small network is hundreds of kernels of a few microseconds, which take Python far longer
to launch one by one than the GPU to run. A graph launches them all at once.
"""

import torch

WARM_UP = 3  # steps that are launched one by one: they make the state that the graph then reuses


class GraphedStep:
    """A step that is recorded once and replayed; called with (rows (b,), fraction of the steps done).

    Parameters
    ----------
    step : (rows (b,) int64 on the device, fraction of the steps done) -> tensor. It must not wait
        for the GPU, and do the same for every batch.
    device : the GPU.
    changes_at : fractions of the steps from which `step` does something else: there it is recorded
        again.
    """

    def __init__(self, step, device, changes_at=()):
        self.step, self.changes_at = step, changes_at
        self.stream = torch.cuda.Stream(device)
        self.rows = self.graph = self.result = None
        self.phase, self.steps = -1, 0

    def __call__(self, rows, progress):
        phase = sum(progress >= start for start in self.changes_at)
        if phase != self.phase:
            self.phase, self.steps, self.graph = phase, 0, None
        rows = torch.from_numpy(rows)
        if self.rows is None:
            self.rows = torch.empty_like(rows, device=self.stream.device)
        self.rows.copy_(rows)
        self.steps += 1
        if self.steps <= WARM_UP:
            return self._outside_a_graph(progress)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.result = self.step(self.rows, progress)
        self.graph.replay()
        return self.result

    def _outside_a_graph(self, progress):
        """The step, on the stream that records it later."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = self.step(self.rows, progress)
        current.wait_stream(self.stream)
        return result
