"""What a push takes from where: a run's model, a model folder, and the models along the way."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_genlm.errors import UserError
from hf_genlm.files import refuse_links_out
from hf_genlm.hub.manifest import Leaving, canary_texts, inspect
from hf_genlm.hub.push import Content
from hf_genlm.run_folder import RunFolder

CARD = "README.md"


@dataclass(frozen=True)
class Parcel:
    """A model folder, and the run that made it, if one did."""

    folder: Path
    run: RunFolder | None

    @classmethod
    def of(cls, path: str) -> "Parcel":
        """From a run folder, its model/, or any other model folder.

        Raises:
            UserError: no model lies there.
        """
        given = Path(path)
        run = next((run for run in map(RunFolder, (given, given.parent)) if _is_of(given, run)), None)
        folder = given if run is None else run.model
        if run is not None:
            refuse_links_out(run.path)
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise UserError(
                f"{path!r} holds no whole model: neither it nor its model/ has config.json and weights in "
                "safetensors; 'train' writes them"
            )
        return cls(folder, run)

    def inspect(self) -> Leaving:
        """What leaves of it, and what must not, the canaries of a run that it lies in included."""
        runs = [RunFolder(parent) for parent in list(self.folder.resolve().parents)[:2]]
        runs += [] if self.run is None else [self.run]
        return inspect(self.folder, [text for run in runs for text in canary_texts(run.canaries)])

    def milestones(self) -> list["Parcel"]:
        """The models of the run after so many words, by their age.

        Raises:
            UserError: there are none.
        """
        folder = None if self.run is None else self.run.milestones
        found = [] if folder is None or not folder.is_dir() else sorted(folder.glob("chck_*"), key=_age_of)
        if not found:
            raise UserError(
                f"--branches: {str(self.folder)!r} is of no run with milestones/; training.milestone_words "
                "makes them"
            )
        return [Parcel(path, self.run) for path in found]


def _is_of(path: Path, run: RunFolder) -> bool:
    return run.recipe.is_file() and path.resolve() in (run.path.resolve(), run.model.resolve())


def contents(leaving: Leaving) -> dict[str, Content]:
    """Where each file lies that leaves."""
    return {name: leaving.folder / name for name in leaving.sizes}


def milestone_contents(leaving: Leaving, repo_id: str) -> Mapping[str, Content]:
    """As `contents`, with a card that says where the measured model is."""
    name = leaving.folder.name.removeprefix("chck_")
    words = (
        f"# {repo_id} after {name} words\n\nA model along the way. The card of the last one is on `main`.\n"
    )
    return {CARD: words.encode(), **contents(leaving)}


def _age_of(folder: Path) -> tuple[float, str]:
    return folder.stat().st_mtime, folder.name
