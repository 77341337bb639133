"""Execute: runs the executor of a step's pass, by its name."""

from __future__ import annotations

from compress.executors.step_run import StepRun


def execute(run: StepRun) -> dict[str, float]:
    """Writes every weight of a step that is not journaled yet. Returns the seconds of each kind of work."""
    executor = run.pass_.executor()
    if executor == "sweep":
        from compress.contract.shapes import ObservingPass
        from compress.executors.sweep import sweep, sweep_by

        assert isinstance(run.pass_, ObservingPass)
        if run.pass_.two_streams():
            from compress.executors.two_streams import TwoStreamSweep

            return sweep_by(run, TwoStreamSweep)
        return sweep(run)
    if executor == "smooth":
        from compress.executors.smooth import smooth

        return smooth(run)
    if executor == "train":
        from compress.executors.train import train

        return train(run)
    if executor == "slice":
        from compress.executors.slice import cut

        return cut(run)
    if executor == "rotate":
        from compress.executors.rotate import rotate

        return rotate(run)
    if executor == "cache":
        from compress.executors.cache import cache

        return cache(run)
    if executor == "blocks":
        from compress.executors.blocks import blocks

        return blocks(run)
    from compress.executors.stream import stream

    stream(run)
    return {}
