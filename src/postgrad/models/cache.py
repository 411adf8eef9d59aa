"""The cache of models that are made or converted once: whole folders, put in place atomically."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from postgrad.errors import PostgradError


def cache_folder() -> Path:
    """Where such models are kept: `$POSTGRAD_CACHE` or `~/.cache/postgrad`."""
    return Path(os.environ.get("POSTGRAD_CACHE") or Path.home() / ".cache" / "postgrad")


def cached_folder(name: str, key: Mapping[str, object], make: Callable[[Path], None]) -> Path:
    """The folder that `make` filled for this `key`, made now if it is not there yet.

    `make` works in a temporary folder which is renamed when complete, so that a killed or a
    concurrent process never leaves or sees half of one.
    """
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]
    target = cache_folder() / f"{name}-{digest}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            make(temporary)
            temporary.rename(target)
        except OSError:
            # another process may have put the same folder in place first
            if not target.is_dir():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise PostgradError(f"cannot write the cache {target}: {error.strerror}") from error
    return target
