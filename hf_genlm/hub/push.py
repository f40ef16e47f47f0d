"""Publish a model folder on the Hub: one commit, read back, loaded in a clean process, tagged.

The card of a run names that commit; no commit can hold its own hash, so a second one writes it there.
A push that failed leaves the repository either unchanged or complete, and the same push resumes it:
`create_commit` of huggingface_hub skips unchanged files and large files that were uploaded before.
"""

import contextlib
import fnmatch
import functools
import inspect
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_genlm.errors import UserError, without_secrets
from hf_genlm.files import read_bytes, sha256_of, write_text
from hf_genlm.hub.manifest import CODE, Manifest, ModelSource, build_manifest, check_findings
from hf_genlm.run_folder import Listener

MAIN = "main"
CARD = "README.md"
_MAX_TRIES = 5
_MAX_WAIT_S = 600  # a longer wait that the Hub asks for ends the push
_DEFAULT_WAIT_S = 10  # when the Hub asks to wait without saying how long
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"v([0-9]+)")
_PIN = re.compile(rb'^REVISION = "([0-9a-f]{40})"', re.M)  # of a card's loading example
_URL = re.compile(r"(?<!\S)\S+?://\S+")
# files of an older push that would be loaded together with those of a newer one
_STALE = ("*_genlm.py", "model*.safetensors", "model.safetensors.index.json", "vocab.json", "merges.txt")
# environment variables that the process that loads a pushed model gets
_HARMLESS = (
    "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "SYSTEMROOT",
    "LANG", "TMPDIR", "TEMP", "TMP", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_DISABLE_XET",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
)  # fmt: skip
# remedy by HTTP status
_REMEDIES = {
    401: "the Hub does not accept the access token: run `hf auth login` with one that may write",
    403: "the access token may not write there: run `hf auth login` with one that may",
    404: "not found, or hidden from the access token: check OWNER/NAME, and run `hf auth login`",
    409: "somebody else changed it at the same time",
    412: "somebody else changed it at the same time",
    413: "the upload is larger than the Hub accepts",
    429: "the Hub accepts no more requests for now",
}
_SERVER_ERROR = "the Hub has a server error"
_NETWORK_ERROR = "the connection failed"


class PushFailed(UserError):
    """A push that failed for a reason outside this program; the same push resumes it."""

    def __init__(self, message: str):
        super().__init__(f"{message}; push again to resume")


@dataclass(frozen=True)
class PushResult:
    """A finished push, or with `commit` None a dry run."""

    repo_id: str
    manifests: list[Manifest]  # of the model, then of each milestone
    url: str | None = None
    commit: str | None = None
    tag: str | None = None
    branches: dict[str, str] = field(default_factory=dict)  # commit by branch
    revision: str | None = None  # commit that the card loads; None: it was left as it is


def push(
    model: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    tag: str | None = None,
    branches: bool = False,
    keep_card: bool = False,
    allow: Sequence[str] = (),
    dry_run: bool = False,
    listener: Listener | None = None,
    sleep: Callable[[float], None] = time.sleep,
    check_load: Callable[..., None] | None = None,
) -> PushResult:
    """Publish the model of a run, or any model folder, on the Hub.

    Args:
        model: run folder, its model/, or a model folder.
        repo_id: OWNER/NAME; a missing repository is created.
        private: create the repository as private; refuse a public one.
        tag: version name; default: the next of v1, v2, ...
        branches: also push the run's milestones, one branch each.
        keep_card: push README.md as it is; default: write the run's model card, which names the commit.
        allow: findings that may be published, as `README.md:home-path`.
        dry_run: only write the card and list the files.
        listener: receives `manifest` (with `manifest`) before anything is sent, then `progress` and `note`.
        sleep: waits for a number of seconds when the Hub asks for it.
        check_load: takes the arguments of `load_in_clean_process`, which is the default, and raises if the
            model does not load.

    Raises:
        UserError: there is no model, it holds something that must not be published, or `tag` is taken.
        PushFailed: network, Hub or access token failed, or the Hub returned other files than were sent.
    """
    from hf_genlm.card import is_edited, write_card

    tell = listener or (lambda event, fields: None)
    _check_names(repo_id, tag)
    source = ModelSource.find(model)
    sources = [source, *(source.milestones() if branches else [])]
    card = source.folder / CARD
    run = None if keep_card or (source.run and is_edited(card)) else source.run
    if run is not None:
        write_card(run, repo_id)
    manifests = [build_manifest(each) for each in sources]
    for manifest in manifests:
        tell("manifest", {"manifest": manifest})
    check_findings(manifests, allow)
    if dry_run:
        return PushResult(repo_id, manifests)

    def show(task: str) -> None:
        tell("progress", {"task": task, "done": 0, "total": None})

    show("asking the Hub")
    with _hub_messages_to(lambda message: tell("note", {"message": message})), tempfile.TemporaryDirectory(
        ignore_cleanup_errors=True
    ) as home:  # fmt: skip
        repository = HubRepository(repo_id, tell, sleep)
        repository.open(private)
        files = manifests[0].paths
        others = {name: path for name, path in files.items() if name != CARD}
        head, pin = repository.read_head(Path(home)) if run else (None, None)
        sent = others if pin else files  # a card that names a commit is true of it, and stays for now
        show(f"uploading {len(files)} files, {manifests[0].num_bytes:,} bytes")
        revision = commit = repository.commit(sent, "Model pushed by hf_genlm", tag=tag)
        show("reading it back")
        if pin and commit == head and not repository.compare(pin, others, Path(home)):
            revision = pin
        repository.verify(revision, sent, Path(home), tag)
        show("loading it from the Hub in a clean process")
        check = check_load or load_in_clean_process
        check(repo_id, revision, Path(home), repository.api.endpoint, repository.is_public)
        if run is not None:
            write_card(run, repo_id, revision=revision)
            manifests[0] = build_manifest(source)
            check_findings(manifests, allow)
            message = "Model card names the commit of the weights"
            commit = repository.commit(files, message, tag=tag, parent=commit)
            repository.verify(commit, files, Path(home), tag)
        elif (old := _pin_of(card)) and repository.compare(old, others, Path(home)):
            text = f"{CARD} is left as it is, and its example loads commit {old[:8]}, not these files"
            tell("note", {"message": f"{text}: write their commit there, {revision}"})
        version = repository.tag(commit, tag)
        commits = {}
        for milestone in manifests[1:]:
            name = milestone.folder.name
            show(f"uploading {name}")
            card = Path(home) / "card.md"
            write_text(
                card,
                f"# {repo_id} after {name.removeprefix('chck_')} words\n\n"
                f"An intermediate model. The card of the final model is on `{MAIN}`.\n",
            )
            files = {CARD: card, **milestone.paths}
            repository.create_branch(name, commit)
            commits[name] = repository.commit(files, f"Model {name} pushed by hf_genlm", branch=name)
            repository.verify(commits[name], files, Path(home))
    return PushResult(repo_id, manifests, repository.url, commit, version, commits, revision if run else None)


def _check_names(repo_id: str, tag: str | None) -> None:
    owner, slash, name = repo_id.partition("/")
    if not slash or not _NAME.fullmatch(owner) or not _NAME.fullmatch(name) or len(repo_id) > 96:
        raise UserError(f"{repo_id!r} is not a repository id: write OWNER/NAME, in letters, digits, . - _")
    if tag is not None and (not _NAME.fullmatch(tag) or tag == MAIN):
        raise UserError(f"--tag {tag!r}: name a version in letters, digits, . - _, such as v1")


def _pin_of(card: Path) -> str | None:
    """Commit in the loading example of a card; None if it names none, or there is no card."""
    found = _PIN.search(read_bytes(card)) if card.is_file() else None
    return found[1].decode() if found else None


class HubRepository:
    """One model repository, accessed with the token that huggingface_hub finds.

    A request is repeated when the Hub asks to wait; a failure says in which state the repository is.
    """

    def __init__(self, repo_id: str, tell: Listener, sleep: Callable[[float], None]):
        from huggingface_hub import HfApi, constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise UserError("HF_HUB_OFFLINE is set: unset it to push")
        if get_token() is None:
            raise UserError(
                "there is no access token of the Hub: run `hf auth login` with one that may write"
            )
        self.repo_id, self.tell, self.sleep, self.api = repo_id, tell, sleep, HfApi()
        self.url = f"{self.api.endpoint}/{repo_id}"
        self.state = "unchanged"  # the repository's, if the next request fails
        self.is_public = False  # readable without a token; known once `open` is called

    def open(self, private: bool) -> None:
        """Find the repository, or create it.

        Raises:
            UserError: it must be private and is public.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = self._ask(self.api.model_info, self.repo_id, expected=RepositoryNotFoundError)
        except RepositoryNotFoundError:
            self._ask(self.api.create_repo, self.repo_id, private=private or None, exist_ok=True)
            self.state = "created and empty"
            info = self._ask(self.api.model_info, self.repo_id)
        if private and not info.private:
            raise UserError(
                f"--private: {self.repo_id!r} exists and is public: make it private in its settings on the "
                "Hub, or name another"
            )
        self.is_public = not (info.private or info.gated)

    def read_head(self, home: Path) -> tuple[str, str | None]:
        """Return the newest commit, and the one that the card there names, if it names one."""
        head = self._ask(self.api.model_info, self.repo_id, revision=MAIN)
        if all(sibling.rfilename != CARD for sibling in head.siblings):
            return head.sha, None
        where = {"revision": head.sha, "cache_dir": home / "hub"}
        return head.sha, _pin_of(Path(self._ask(self.api.hf_hub_download, self.repo_id, CARD, **where)))

    def commit(
        self, files: Mapping[str, Path], message: str, branch: str = MAIN, tag: str | None = None,
        parent: str | None = None,
    ) -> str:  # fmt: skip
        """Commit `files` on top of a branch and return the commit; unchanged files make no commit.

        Other files in the repository stay, except stale code and weights. If `tag` exists nothing is sent:
        `verify` then decides whether it names the same files. If `parent` is given, the branch must be there.

        Raises:
            PushFailed: the request failed, or somebody else pushed at the same time.
            UserError: `tag` names an older commit, or the repository holds code of others.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        head = self._ask(self.api.model_info, self.repo_id, revision=branch)
        if tag is not None and (tagged := self._tags().get(tag)) is not None:
            if tagged != head.sha:
                raise self._tag_taken(tag)
            return tagged
        others = sorted({sibling.rfilename for sibling in head.siblings} - files.keys())
        stale = [name for name in others if any(fnmatch.fnmatchcase(name, pattern) for pattern in _STALE)]
        code = [name for name in others if Path(name).suffix.lower() in CODE and name not in stale]
        if code:
            raise UserError(
                f"{self.url} holds code that is not of this push: {', '.join(code)}: remove it there, or "
                "name another repository"
            )
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        made = self._ask(
            self.api.create_commit,
            self.repo_id,
            operations,
            commit_message=message,
            revision=branch,
            parent_commit=parent or head.sha,
        )
        self.state = f"complete at commit {made.oid[:8]}"
        return made.oid

    def compare(self, commit: str, files: Mapping[str, Path], home: Path) -> list[str]:
        """Download a commit into the cache below `home` and return those of `files` that differ there."""
        from huggingface_hub.errors import RevisionNotFoundError

        where: dict[str, Any] = {"revision": commit, "cache_dir": home / "hub"}
        try:
            got = self._ask(self.api.snapshot_download, self.repo_id, expected=RevisionNotFoundError, **where)
        except RevisionNotFoundError:
            return list(files)
        found = [name for name in files if (Path(got) / name).is_file()]
        same = {name for name in found if sha256_of(Path(got) / name) == sha256_of(files[name])}
        return [name for name in files if name not in same]

    def verify(self, commit: str, files: Mapping[str, Path], home: Path, tag: str | None = None) -> None:
        """Download a commit and compare every file.

        Raises:
            PushFailed: the Hub returned other files.
            UserError: `tag` exists and names other files.
        """
        different = self.compare(commit, files, home)
        if different and tag is not None and tag in self._tags():
            raise self._tag_taken(tag)
        if different:
            raise PushFailed(f"{self.url} returns other content than was sent: {', '.join(different)}")

    def create_branch(self, name: str, commit: str) -> None:
        """Create a branch at `commit` unless there is one of that name."""
        self._ask(self.api.create_branch, self.repo_id, branch=name, revision=commit, exist_ok=True)

    def tag(self, commit: str, tag: str | None) -> str:
        """Tag `commit` and return the tag; default: its existing version, or the next of v1, v2, ...

        Raises:
            UserError: `tag` names another commit.
        """
        commits = self._tags()
        versions = {name: int(found[1]) for name in commits if (found := _VERSION.fullmatch(name))}
        if tag is None:
            existing = [name for name in versions if commits[name] == commit]
            tag = existing[0] if existing else f"v{max(versions.values(), default=0) + 1}"
        if commits.get(tag, commit) != commit:
            raise self._tag_taken(tag)
        if tag not in commits:
            self._ask(self.api.create_tag, self.repo_id, tag=tag, revision=commit)
        return tag

    def _tag_taken(self, tag: str) -> UserError:
        return UserError(f"--tag {tag!r}: {self.url} has that version with other files: choose a new name")

    def _tags(self) -> dict[str, str]:
        refs = self._ask(self.api.list_repo_refs, self.repo_id)
        return {tag.name: tag.target_commit for tag in refs.tags}

    def _ask(self, request: Callable[..., Any], *args: Any, expected: Any = (), **kwargs: Any) -> Any:
        """Send a request; repeat it after the time that the Hub asks to wait.

        Raises:
            PushFailed: it failed otherwise; exceptions of `expected` are raised as they are.
        """
        from huggingface_hub.errors import HTTPError

        for attempt in range(1, _MAX_TRIES + 1):
            try:
                return request(*args, **kwargs)
            except (HTTPError, RuntimeError, OSError, ValueError) as error:
                response = next(
                    (r for cause in _causes(error) if (r := getattr(cause, "response", None))), None
                )
                status = None if response is None else response.status_code
                if expected and isinstance(error, expected) and status != 401:
                    raise
                asked = "" if response is None else response.headers.get("Retry-After", "")
                wait_s = float(asked) if asked.isdecimal() else _DEFAULT_WAIT_S
                if status != 429 or attempt == _MAX_TRIES or wait_s > _MAX_WAIT_S:
                    reason = _explain(error, status)
                    if reason is None:
                        raise
                    later = f", try again in {wait_s:.0f} s" if status == 429 else ""
                    is_unknown = _NETWORK_ERROR in reason and not self.state.startswith("complete")
                    lost = " or, if only the answer was lost, complete" if is_unknown else ""
                    message = f"{self.url}: {reason}{later}; the repository is {self.state}{lost}"
                    raise PushFailed(message) from error
            self.tell("note", {"message": f"the Hub asks to wait {wait_s:.0f} s"})
            self.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _explain(error: BaseException, status: int | None) -> str | None:
    """Return the reason of a failed request; None for a bug. Uploads of large files raise RuntimeError."""
    from huggingface_hub.errors import HTTPError

    message = without_secrets(" ".join(str(error).split()))[:300]
    if status is not None:
        return f"{_REMEDIES.get(status, _SERVER_ERROR if status >= 500 else message)} (HTTP status {status})"
    if isinstance(error, PermissionError) and type(error).__module__ == "hf_xet":
        return _REMEDIES[401]
    if any(isinstance(c, (HTTPError, ConnectionError, TimeoutError, RuntimeError)) for c in _causes(error)):
        return f"{_NETWORK_ERROR} ({message})"
    return message if isinstance(error, OSError) and error.errno is not None else None  # such as a full disk


@contextlib.contextmanager
def _hub_messages_to(note: Callable[[str], None]) -> Iterator[None]:
    """Pass warnings of huggingface_hub to `note`, without URLs (they may be signed), and hide its bars."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    handler = logging.Handler(logging.WARNING)
    note = functools.cache(note)  # each message once
    handler.emit = lambda record: note(_URL.sub("the Hub", record.getMessage()))  # type: ignore[method-assign]
    had_bars = not are_progress_bars_disabled()
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    disable_progress_bars()
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before
        if had_bars:
            enable_progress_bars()


def load_in_clean_process(
    repo_id: str, commit: str, home: Path, endpoint: str, is_public: bool = True
) -> None:
    """Load a model by its Hub id in a new process without this package, and generate with it.

    The process runs the code of the repository, so it gets neither the access token nor the rest of this
    process's environment, and `home` as its home folder.

    Args:
        home: HF_HOME of the process; what is cached there is not downloaded again.
        is_public: False: the process reads only what is cached in `home`.

    Raises:
        PushFailed: it does not load.
    """
    environment = {name: value for name, value in os.environ.items() if name.upper() in _HARMLESS}
    environment |= dict.fromkeys(("HF_HOME", "HOME", "USERPROFILE"), str(home)) | {"HF_ENDPOINT": endpoint}
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {} if is_public else {"HF_HUB_OFFLINE": "1"}
    script = f"{inspect.getsource(_load_and_generate)}\n_load_and_generate({repo_id!r}, {commit!r})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PushFailed(
            f"{endpoint}/{repo_id} was pushed, at commit {commit[:8]}, but does not load in a clean process: "
            f"{last_line[:500]}"
        )


def _load_and_generate(repo_id: str, revision: str) -> None:
    """Load model and tokenizer and generate eight tokens; its source is all that the new process runs."""
    import sys

    sys.modules["hf_genlm"] = None  # type: ignore[assignment]  # an import of it fails
    import torch
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(repo_id, revision=revision, trust_remote_code=True)
    if isinstance(try_to_load_from_cache(repo_id, "tokenizer_config.json", revision=revision), str):
        AutoTokenizer.from_pretrained(repo_id, revision=revision, trust_remote_code=True)
    prompt = torch.tensor([[model.config.bos_token_id or 0]])
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
