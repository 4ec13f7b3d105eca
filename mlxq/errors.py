"""Every error a person can cause. The command line prints one line of it and exits with status 1."""


class MlxqError(Exception):
    """Base of all mlxq errors; the message says where, which rule, both values, and what to do."""


class CheckpointError(MlxqError):
    """A source cannot be read: missing, truncated, inconsistent, or of a kind that is not supported."""


class PlanError(MlxqError):
    """A conversion was asked for that cannot be planned: illegal bits, group size, recipe or pattern."""


class CalibrationError(MlxqError):
    """A calibration cannot be run: its text is unfit, activations overflow, a budget cannot be met."""


class FormatError(MlxqError):
    """An encoding was used outside its rules (bits, group size, shapes, dtypes of its parts), or a file breaks them."""


class BackendError(MlxqError):
    """A computing back end is unknown, unavailable, or cannot do what was asked."""


class OutputError(MlxqError):
    """The result cannot be written: it exists, the place is not writable, the disk is full."""


class VerificationError(MlxqError):
    """The converted model is not finite or is further from its source than its bits per weight allow."""


class EvaluationError(MlxqError):
    """Models cannot be measured: a text that is unfit, tokenizers that differ, logits that are not finite."""


class GenerationError(MlxqError):
    """Text cannot be generated: prompt longer than the context, no chat template, non-finite logits."""


class UsageError(MlxqError):
    """The command line was used in a way that it does not have: a misspelt option, a missing argument."""


class Cancelled(MlxqError):
    """The caller cancelled the work through its `CancelToken`."""
