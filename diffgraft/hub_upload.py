"""Uploading an adapter with its card to the Hugging Face hub."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffgraft.errors import DiffgraftError, one_line, wrap_system_errors
from diffgraft.model_card import CARD_NAME, HUB_ID, PICTURES, make_card
from diffgraft.progress import phase
from diffgraft.trainers.run.folder import adapter_file

_SECONDS = 10
"""Seconds to wait for a first answer of the hub"""
_TOKEN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."


@wrap_system_errors
def push(
    source: str | Path,
    name: str,
    *,
    public: bool = False,
    pictures: Sequence[str | Path] = (),
    base_model: str = "",
    message: str = "Upload adapter",
) -> str:
    """Upload an adapter with its card and pictures to a repository on the hub, which is created if it is missing.

    The token is that of huggingface_hub: of ``hf auth login``, or in the environment variable ``HF_TOKEN``. A
    `README.md` beside the adapter is uploaded as it is; without one the card is made, and stays on the hub alone. Other
    files of a run, such as its recipe with paths of this machine, are not uploaded.

    Args:
        source: the folder of a run, or an adapter file of any tool.
        name: name of the repository, ``owner/name``.
        public: whether a new repository is public; an existing one keeps its visibility.
        pictures: as for `card`, if the card is made.
        base_model: as for `card`, if the card is made.
        message: message of the commit.

    Returns:
        Address of the repository.

    Raises:
        DiffgraftError: there is no adapter or no token, the hub cannot be reached, or it refuses.
    """
    if not HUB_ID.fullmatch(name):
        raise DiffgraftError(f"Invalid repository {name!r}: must be OWNER/NAME, such as {_suggested(name)}.")
    file = adapter_file(source)
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, get_token

    if not get_token():
        raise DiffgraftError(f"There is no token for the hub. {_TOKEN}")
    files = _files(file, pictures, base_model, name.partition("/")[2])
    api = HfApi()
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    try:
        with phase(f"uploading to {name}"):
            get_session().head(constants.ENDPOINT, timeout=_SECONDS)  # uploads are tried again for half a minute
            address = api.create_repo(name, private=not public, exist_ok=True)
            api.create_commit(name, operations, commit_message=message)
    except Exception as error:  # the client raises exceptions of several libraries
        raise DiffgraftError(_reason(error, name)) from error
    return str(address)


def _files(file: Path, pictures: Sequence[str | Path], base_model: str, title: str) -> dict[str, Any]:
    """Return everything that is uploaded: path in the repository → path of a file, or bytes."""
    own = [file]
    if file.name == "adapter.safetensors":  # of a run, with its words beside it
        own += sorted(path for path in file.parent.glob("adapter.*.safetensors") if path.is_file())
    files: dict[str, Any] = {path.name: path for path in own}
    written = file.parent / CARD_NAME
    if written.is_file():
        kept = sorted(path for path in (file.parent / PICTURES).glob("*") if path.is_file())
        return files | {CARD_NAME: written} | {f"{PICTURES}/{path.name}": path for path in kept}
    card = make_card(file, pictures, base_model, title)
    files[CARD_NAME] = card.text.encode()
    for path, image in card.pictures.items():
        image.save(content := io.BytesIO(), "PNG", optimize=True)
        files[path] = content.getvalue()
    return files


def _reason(error: Exception, name: str) -> str:
    """Return one sentence on why an upload failed."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    owner = name.partition("/")[0]
    if isinstance(error, OfflineModeIsEnabled):
        return "The hub is switched off by HF_HUB_OFFLINE: unset it to upload."
    if isinstance(error, HFValidationError):
        return f"Invalid repository {name!r}: {one_line(error, 200)}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        told = one_line(error.server_message or "", 200)
        if status == 401:
            return f"The hub does not accept the token ({told or 'status 401'}). {_TOKEN}"
        if status in (403, 404):
            return f"The token may not write to {owner} on the hub ({told or f'status {status}'}). {_TOKEN}"
        return f"The hub refused the upload to {name} (status {status}{': ' + told if told else ''})."
    return f"The hub cannot be reached ({one_line(error, 200) or type(error).__name__}). Try again later."


def _suggested(name: str) -> str:
    words = re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2]).strip("-.")
    return f"your-name/{words or 'my-adapter'}"
