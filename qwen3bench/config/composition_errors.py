"""What Hydra, OmegaConf and YAML find wrong while composing, as `UserError`; their exceptions say it as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra.errors import MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

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
        group, _, name = (error.missing_cfg_file or "").partition("/")
        known = group in (*SEVERAL, *SINGLE)
        raise UserError(no_such_choice(group, name) if known else _first_lines(error)) from error
    except OSError:
        raise
    except Exception as error:
        key_error = error.__cause__
        if isinstance(key_error, (ConfigAttributeError, ConfigKeyError)) and key_error.full_key:
            raise UserError(_no_such_key(key_error, overrides)) from error
        raise UserError(_first_lines(error)) from error


def _no_such_key(error: ConfigAttributeError | ConfigKeyError, overrides: Sequence[str]) -> str:
    missing = str(error.full_key)
    group, _, name = missing.partition(".")
    keys = [override.partition("=")[0].lstrip("+") for override in overrides]
    if group in SEVERAL and (key := next((key for key in keys if key.startswith(f"{missing}.")), None)):
        if name not in choices(group):
            return no_such_choice(group, name)
        return f"{key} sets an option of {name}, which is not in this run; add {group}={name}"
    siblings = [str(key) for key in error.parent_node] if isinstance(error.parent_node, DictConfig) else []
    hint = nearest(str(error.key), siblings) or "; `python -m qwen3bench --cfg job` shows what can be set"
    return f"there is no setting {missing!r}{hint}"


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
