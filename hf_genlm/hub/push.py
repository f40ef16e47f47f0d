"""A folder becomes a commit of a Hub repository: whole or not at all, read back, loaded, tagged.

What lies there already is compared by hash, and only what differs is sent, all of it in one commit on top of
the one that was compared. So a push that failed leaves the repository as it was, and the same push goes on.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_genlm.errors import UserError
from hf_genlm.hub.errors import NETWORK_REMEDY, REMEDIES, PushFailed, reason_of, status_of, wait_asked

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

Content = Path | bytes  # of a file, by where it lies or as it is
MAIN = "main"
_MAX_TRIES = 5
_MAX_WAIT_S = 600  # that the Hub may ask for; beyond, a person is told when to come back
_CHUNK = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"v([0-9]+)")
# files of an older push that would be loaded, or lie about, beside those of a newer one
_REPLACED = ("*_genlm.py", "model*.safetensors", "model.safetensors.index.json", "vocab.json", "merges.txt")


def check_names(repo_id: str, tag: str | None = None) -> None:
    """Of a repository and of a version.

    Raises:
        UserError: the Hub would not take them.
    """
    owner, slash, name = repo_id.partition("/")
    if not slash or not _NAME.fullmatch(owner) or not _NAME.fullmatch(name) or len(repo_id) > 96:
        raise UserError(f"{repo_id!r} is no id of a repository: say OWNER/NAME, in letters, digits, . - _")
    if tag is not None and (not _NAME.fullmatch(tag) or tag == MAIN):
        raise UserError(f"--tag {tag!r}: name a version in letters, digits, . - _, as v1")


class Hub:
    """One repository of the Hub, for a person whose token huggingface_hub finds by itself.

    `note` hears what a person should know; `wait` sleeps so many seconds.
    """

    def __init__(
        self,
        repo_id: str,
        note: Callable[[str], None] = lambda message: None,
        wait: Callable[[float], None] = time.sleep,
    ):
        from huggingface_hub import HfApi, constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise UserError("HF_HUB_OFFLINE keeps from the Hub: unset it to push")
        if get_token() is None:
            raise UserError("there is no access token of the Hub: `hf auth login` with one that may write")
        self.repo_id, self.note, self.wait, self.api = repo_id, note, wait, HfApi()
        self.state = "untouched"  # what is left of the repository if the next request fails

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo_id}"

    def open(self, private: bool) -> None:
        """Find the repository, or make it.

        Raises:
            UserError: it is to be private and is public.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = self._ask(self.api.model_info, self.repo_id, passing=RepositoryNotFoundError)
        except RepositoryNotFoundError:
            self._ask(self.api.create_repo, self.repo_id, private=private or None, exist_ok=True)
            self.state = "made, and empty"
            info = self._ask(self.api.model_info, self.repo_id)
        if private and not info.private:
            raise UserError(
                f"--private: {self.repo_id!r} is there, and public: make it private in its settings on "
                "the Hub, or name another"
            )

    def push(
        self, files: Mapping[str, Content], message: str, branch: str = MAIN, tag: str | None = None
    ) -> str:
        """Make `branch` hold `files`, by one commit where it does not, and read it back.

        Files that are there besides stay, but for code and weights of an older push. `tag` is what the commit
        is to be called: nothing is sent where that is another one's name.

        Returns:
            The id of the commit.

        Raises:
            PushFailed: it failed; or what is there is not what was sent.
            UserError: `tag` is taken.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        info = self._ask(self.api.model_info, self.repo_id, revision=branch)
        there = self._tree(info.sha)
        operations: list[Any] = [
            CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
            for name, content in files.items()
            if not is_same(content, there.get(name))
        ]
        gone = [name for name in there if name not in files and _is_replaced(name)]
        operations += [CommitOperationDelete(name) for name in gone]
        if tag is not None:
            self._check_tag(tag, self._tags(), None if operations else info.sha)
        if not operations:
            return info.sha
        made = self._ask(
            self.api.create_commit,
            self.repo_id,
            operations,
            commit_message=message,
            revision=branch,
            parent_commit=info.sha,
        )
        self.state = f"whole, at commit {made.oid[:8]}"
        there = self._tree(made.oid)
        wrong = [name for name, content in files.items() if not is_same(content, there.get(name))]
        if wrong:
            raise PushFailed(f"{self.url} does not hold what was sent: {', '.join(wrong)}")
        return made.oid

    def make_branch(self, name: str, commit: str) -> None:
        """A branch that begins at `commit`, where there is none of that name."""
        names = {branch.name for branch in self._ask(self.api.list_repo_refs, self.repo_id).branches}
        if name not in names:
            self._ask(self.api.create_branch, self.repo_id, branch=name, revision=commit)

    def tag(self, commit: str, tag: str | None) -> str:
        """Give `commit` the version `tag`: by default the one that it has, or else the next of v1, v2 ...

        Raises:
            UserError: another commit has it.
        """
        commits = self._tags()
        if tag is None:
            numbers = [int(found[1]) for name in commits if (found := _VERSION.fullmatch(name))]
            has = [name for name in commits if commits[name] == commit and _VERSION.fullmatch(name)]
            tag = has[0] if has else f"v{max(numbers, default=0) + 1}"
        self._check_tag(tag, commits, commit)
        if tag not in commits:
            self._ask(self.api.create_tag, self.repo_id, tag=tag, revision=commit)
        return tag

    def prove(self, commit: str, files: Mapping[str, Content]) -> None:
        """Download it into an empty cache, compare every file, and generate with it where nothing of ours is.

        Raises:
            PushFailed: it cannot be had or used as it was sent.
        """
        found = _load_in_clean_process(self.repo_id, commit, self.api.endpoint)
        wrong = [name for name, content in files.items() if found["files"].get(name) != sha256_of(content)]
        if wrong:
            raise PushFailed(f"{self.url} does not give back what was sent: {', '.join(wrong)}")

    def _check_tag(self, tag: str, commits: Mapping[str, str], commit: str | None) -> None:
        if tag in commits and commits[tag] != commit:
            raise UserError(f"--tag {tag!r}: {self.url} has that version, of another commit: name a new one")

    def _tags(self) -> dict[str, str]:
        refs = self._ask(self.api.list_repo_refs, self.repo_id)
        return {tag.name: tag.target_commit for tag in refs.tags}

    def _tree(self, commit: str) -> dict[str, "RepoFile"]:
        from huggingface_hub import RepoFile

        entries = self._ask(
            lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit))
        )
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _ask(self, request: Callable[..., Any], *args: Any, passing: Any = (), **kwargs: Any) -> Any:
        """The answer to a request. It is made again where the Hub asks to wait, and after as long.

        Raises:
            PushFailed: it failed otherwise, but for exceptions of `passing` whose status is no 401.
        """
        from huggingface_hub.errors import HTTPError

        for attempt in range(1, _MAX_TRIES + 1):
            try:
                with self._explaining(passing):
                    return request(*args, **kwargs)
            except (HTTPError, RuntimeError) as error:
                if status_of(error) != 429:
                    raise
                seconds = wait_asked(error)
                if attempt == _MAX_TRIES or seconds > _MAX_WAIT_S:
                    raise PushFailed(
                        f"{self.url}: {REMEDIES[429]}: try again in {seconds:.0f} s; "
                        f"the repository is {self.state}"
                    ) from error
            self.note(f"the Hub asks to wait {seconds:.0f} s")
            self.wait(seconds)
        raise AssertionError("the last attempt returns or raises")

    @contextlib.contextmanager
    def _explaining(self, passing: Any) -> Iterator[None]:
        """Errors of a person, the network or the Hub as `PushFailed`; 429 and `passing` as they are."""
        from huggingface_hub.errors import HTTPError

        try:
            yield
        except (HTTPError, RuntimeError, OSError, ValueError) as error:
            status = status_of(error)
            if status == 429 or (passing and isinstance(error, passing) and status != 401):
                raise
            reason = reason_of(error, status)
            if reason is None:
                raise
            lost = " or, if the answer alone was lost, whole" if reason.startswith(NETWORK_REMEDY) else ""
            raise PushFailed(f"{self.url}: {reason}; the repository is {self.state}{lost}") from error


def is_same(content: Content, there: "RepoFile | None") -> bool:
    """True if a file of the repository has this content, by size and hash."""
    if there is None or there.size != size_of(content):
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == sha256_of(content)
    return there.blob_id == _hash(content, hashlib.sha1(b"blob %d\0" % size_of(content)))


def size_of(content: Content) -> int:
    """In bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def sha256_of(content: Content) -> str:
    """In hexadecimal."""
    return _hash(content, hashlib.sha256())


def _hash(content: Content, digest: Any) -> str:
    if isinstance(content, bytes):
        digest.update(content)
        return digest.hexdigest()
    with content.open("rb") as file:
        while part := file.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()


def _is_replaced(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _REPLACED)


def _load_in_clean_process(repo_id: str, commit: str, endpoint: str) -> dict[str, Any]:
    """What clean_load.py prints, run with an empty cache in an empty folder."""
    from huggingface_hub import get_token

    script = Path(__file__).with_name("clean_load.py").read_text(encoding="utf-8")
    hidden = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= {"HF_HOME": folder, "HF_ENDPOINT": endpoint, "HF_TOKEN": get_token() or ""}
        environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script, repo_id, commit],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PushFailed(
            f"{endpoint}/{repo_id} was pushed, at commit {commit[:8]}, but does not load in a clean process: "
            f"{said[:500]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])
