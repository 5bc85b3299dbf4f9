"""What Hydra, OmegaConf and YAML find wrong while composing, as `UserError`; their exceptions say it as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra.errors import MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from qwen3bench.config.choices import SEVERAL, SINGLE, choices, nearest, no_such_choice
from qwen3bench.errors import UserError


@contextmanager
def plain_errors(overrides: Sequence[str]) -> Iterator[None]:
    """Turn an error in composing with `overrides` into a `UserError` of one or two lines."""
    try:
        yield
    except UserError:
        raise
    except MissingConfigException as error:  # an OSError too
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        if group in (*SEVERAL, *SINGLE) or error.options:
            raise UserError(no_such_choice(group, name, error.options or ())) from error
        raise UserError(_told(error)) from error
    except OSError:
        raise
    except Exception as error:
        key_error = error.__cause__
        if isinstance(key_error, (ConfigAttributeError, ConfigKeyError)) and key_error.full_key:
            raise UserError(_no_such_key(key_error, overrides)) from error
        raise UserError(_told(error)) from error


def _no_such_key(error: ConfigAttributeError | ConfigKeyError, overrides: Sequence[str]) -> str:
    missing = str(error.full_key)
    group, _, name = missing.partition(".")
    keys = [override.partition("=")[0].lstrip("+") for override in overrides]
    if group in SEVERAL and (key := next((key for key in keys if key.startswith(f"{missing}.")), None)):
        if name not in choices(group):
            return no_such_choice(group, name)
        return f"{key} sets an option of {name}, which is not in this run; add {group}={name}"
    siblings = [str(key) for key in error.parent_node] if isinstance(error.parent_node, DictConfig) else []
    hint = nearest(str(error.key), siblings)
    if not hint and "." in missing and siblings:
        hint = f"; there are: {', '.join(siblings)}"
    return f"there is no setting {missing!r}{hint or '; `python -m qwen3bench --cfg job` shows what can be set'}"


def _told(error: Exception) -> str:
    """All that an error says, and its cause, on one line; without OmegaConf's types."""
    said = [str(error), *([str(error.__cause__)] if isinstance(error.__cause__, OmegaConfBaseException) else [])]
    lines = [line.strip() for text in said for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("object_type=", "reference_type="))]
    return " ".join(dict.fromkeys(kept)) or type(error).__name__
