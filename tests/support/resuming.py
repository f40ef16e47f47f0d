"""Helpers shared by tests: resuming."""

from hf_genlm.run_folder import RunFolder


def weights_of(run: RunFolder) -> bytes:
    return (run.model / "model.safetensors").read_bytes()


def at_step(step: int, act):
    """Return a listener that calls `act` once, at the first checkpoint of that step or a later one."""
    acted = []

    def hear(event, fields):
        if event == "checkpoint" and fields["step"] >= step and not acted:
            acted.append(fields["step"])
            act()

    return hear
