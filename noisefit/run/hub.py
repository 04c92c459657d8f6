"""The hub: what of an output folder is for everybody's eyes, whether it can be pushed, and the push itself.

All of it is `huggingface_hub`'s work: its token, its endpoint, its ways to send large files.
"""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import RepositoryNotFoundError

import noisefit
from noisefit.base.errors import InputError, LocalError, is_out_of_memory, notice
from noisefit.base.meeting import apart
from noisefit.run.output_folder import OutputFolder
from noisefit.run.run_settings import HubSettings

# Of a run's records those that hold settings and figures. The others hold rows of its data, or what is made of them.
PUBLISHED = ("noisefit_config.json", "layer_snr.json", "noise_policy.json", "metrics.jsonl", "eval_metrics.jsonl")
# What the files of a model, its tokenizer and its card end in; and the one folder that a tokenizer has.
MODEL_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".md", ".py")
TEMPLATES, CARD = "additional_chat_templates/", "README.md"


def publishable(output: OutputFolder, records: Collection[str]) -> list[str]:
    """The files of an output folder that a push takes: the model, its tokenizer and card, and the records in
    `PUBLISHED`. No checkpoints, nothing that shows rows of the data, and nothing that no run wrote.

    Args:
        output: the folder, with a model in it.
        records: every name that a run has for a record.

    Returns:
        Paths in the folder, sorted.

    Raises:
        InputError: one of them is a link, is missing, or was changed since a run wrote it: what would be there is not
            what was trained. A card may be edited.
    """

    def is_published(name: str) -> bool:
        return name in PUBLISHED or (name not in records and name.endswith(MODEL_FILES))

    edited = (output.path / CARD).is_file() and not (output.path / CARD).is_symlink()
    changed = [name for name in output.changed() if is_published(name) and not (name == CARD and edited)]
    changed += [TEMPLATES] if output.is_own(TEMPLATES) and not output.is_whole(TEMPLATES.rstrip("/")) else []
    if changed:
        raise InputError(f"{output.path / changed[0]}: not as the run wrote it (missing, changed, or a link): nothing "
                         "is pushed; put it back, or train or merge again")  # fmt: skip
    names = [name for name in output.files() if is_published(name)]
    if output.is_own(TEMPLATES):
        names += [f"{TEMPLATES}{part}" for part in output.parts(TEMPLATES.rstrip("/"))]
    return sorted(names)


def check_repository(settings: HubSettings, base: str | None = None) -> None:
    """Refuse what the hub would refuse at the end, and change nothing there. All processes call it.

    Args:
        settings: with the repository.
        base: the model that what is pushed is an adapter of; a line says where others cannot have it.

    Raises:
        InputError: no token, or one that may not write there; the hub is not to be reached; a private repository is
            wanted and the one that is there is public.
    """
    if settings.push_to_hub is not None:
        with apart("asking the hub") as is_main:
            if is_main:
                _check_repository(settings, settings.push_to_hub)
        if base is not None and os.path.isdir(base):
            notice(f"{settings.push_to_hub} on the hub will be an adapter of {base}, a folder of this machine: others "
                   "need the same model to use it")  # fmt: skip


def _check_repository(settings: HubSettings, name: str) -> None:
    where = f"{name} on the hub"
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{where}: HF_HUB_OFFLINE is set, with which nothing can be pushed; unset it")
    with asking(where):
        if get_token() is None:
            raise InputError(f"{where}: no token to push with; run `hf auth login`, or set HF_TOKEN to one that may "
                             "write")  # fmt: skip
        api = HfApi()
        user = api.whoami()
        if _role(user) == "read":
            raise InputError(f"{where}: the token may read and not write; make one with the role write")
        name = name if "/" in name else f"{user['name']}/{name}"
        try:
            found = api.model_info(name)
        except RepositoryNotFoundError:
            return  # `make_repository` sees whether it may be made
        if settings.hub_private and not found.private:
            raise InputError(f"{where} is there already and public, and --hub_private asks for a private one; choose "
                             "another name, or make it private there")  # fmt: skip
        _may_write(api, name)


def _role(user: dict[str, Any]) -> object:
    try:
        return user["auth"]["accessToken"]["role"]
    except (KeyError, TypeError):  # a kind of token that has none
        return None


def _may_write(api: HfApi, name: str) -> None:
    try:
        api.auth_check(name, write=True)
    except TypeError:  # an older huggingface_hub asks for reading alone; the push will see
        return


def make_repository(settings: HubSettings) -> None:
    """Make the repository where it is not there: the one way to know that it can be. All processes call it, when all
    else is found to be right.

    Raises:
        InputError: the hub refuses.
    """
    if settings.push_to_hub is not None:
        with apart("making the repository") as is_main:
            if is_main:
                with asking(f"{settings.push_to_hub} on the hub"):
                    _make(HfApi(), settings)


def _make(api: HfApi, settings: HubSettings) -> str:
    private = True if settings.hub_private else None  # an organization may have its own default
    return str(api.create_repo(str(settings.push_to_hub), private=private, exist_ok=True).repo_id)


def push(settings: HubSettings, output: OutputFolder, records: Collection[str]) -> None:
    """Push what is `publishable` in one commit: all of it is there, or none. One process calls it.

    Raises:
        LocalError: it is not pushed; the line has the command that pushes it again.
    """
    name, folder = str(settings.push_to_hub), output.path
    names = publishable(output, records)
    size = sum((folder / path).stat().st_size for path in names)
    notice(f"pushing {len(names)} files, {size / 2**20:.1f} MiB, to {name} on the hub")
    again = shlex.join(["python", "-m", "noisefit.push", str(folder), name, *["--hub_private"] * settings.hub_private])
    with asking(f"{name} on the hub: not pushed", f"; {folder} is whole, and this pushes it again: {again}"):
        api = HfApi()
        full_name = _make(api, settings)
        files = [CommitOperationAdd(path, os.fspath(folder / path)) for path in names]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            commit = api.create_commit(full_name, files, commit_message=f"NoiseFiT {noisefit.__version__}")
        notice(*(" ".join(str(warning.message).split()) for warning in told if warning.category is UserWarning))
    notice(f"pushed: {commit.commit_url}")


@contextmanager
def asking(where: str, advice: str = "") -> Iterator[None]:
    """Turn whatever the hub's client raises into one line, without the token.

    Raises:
        LocalError: as said; `where` begins the line, `advice` ends it.
    """
    try:
        yield
    except InputError as error:
        raise (LocalError(f"{where}: {error}{advice}") if advice else error) from None
    except Exception as error:  # of the client, of what it uses for HTTP, of the system
        if is_out_of_memory(error):
            raise
        raise LocalError(f"{where}: {reason_of(error)}{advice}") from None


def reason_of(error: BaseException) -> str:
    """What went wrong between here and the hub, in some words."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of a large file
        error = error.__cause__
    response = getattr(error, "response", None)
    text = " ".join(str(error).split())
    if response is not None and (status := getattr(response, "status_code", None)):
        said = getattr(error, "server_message", None) or ""
        hint = {401: "it does not accept the token", 403: "the token may not do that", 404: "there is no such place"}
        text = " ".join(f"{hint.get(status, 'it failed')} (status {status}) {said}".split())
    elif isinstance(error, OSError) or "httpx" in type(error).__module__:
        text = f"it cannot be reached: {text or type(error).__name__}"
    return without_secret(text[:300] or type(error).__name__)


def without_secret(text: str) -> str:
    """The text with the token starred out."""
    token = get_token()
    return text.replace(token, "***") if token else text
