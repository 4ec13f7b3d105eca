"""The method of a conversion: what was asked for, else the default, and where that cannot run rounding to nearest."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from mlxq.conversion.job import ConversionResult
from mlxq.conversion.request import BudgetRequest, CalibrationRequest
from mlxq.errors import Cancelled, FormatError, MlxqError, OutputError
from mlxq.plan.default_method import CALIBRATED_DEFAULT, default_method
from mlxq.plan.methods import CALIBRATED
from mlxq.plan.planner import Plan
from mlxq.types import Method

#: Errors that rounding to nearest would meet, too.
_OF_ANY_METHOD = (Cancelled, FormatError, OutputError)


class _CannotRun(MlxqError):
    """The default method cannot run; the message says why."""


@dataclasses.dataclass
class MethodChoice:
    """Decides for one conversion, whose plan comes out of `plan`.

    Attributes:
        asked: the method that was asked for.
        may_fall_back: whether nothing was asked for that needs a text, so that another method may take the place of a
            default that cannot run.
        failure: why the default cannot run, where that was tried.
    """

    asked: Method | None
    needs_text: bool = False
    may_fall_back: bool = False
    failure: str | None = None
    _chosen: Method | None = dataclasses.field(default=None, init=False)

    @classmethod
    def of(cls, asked: Method | None, calibration: CalibrationRequest, budget: BudgetRequest) -> MethodChoice:
        needs_text = bool(budget) or budget.costs is not None or calibration.tune > 0
        return cls(asked, needs_text, asked is None and not needs_text and calibration.is_default)

    def plan(self, planned: Callable[[Method | None], Plan], *, has_own: bool = False) -> Plan:
        """The plan, with a note on the method where that is the default.

        Args:
            planned: makes the plan for a method.
            has_own: the recipe, or an importance matrix, says how codes are chosen.
        """
        if self.asked is not None or has_own:
            return planned(self.asked)
        if self.failure is not None:
            self._chosen, plan = "rtn", planned("rtn")
            note = f"method rtn, since {CALIBRATED_DEFAULT}, the default, cannot run here: {self.failure}"
        else:
            plan = planned(CALIBRATED_DEFAULT)
            self._chosen, note = default_method(plan, needs_text=self.needs_text)
            if self._chosen != CALIBRATED_DEFAULT:
                plan = planned(self._chosen)
        return dataclasses.replace(plan, notes=(*plan.notes, *([note] if note else [])))

    def described(self) -> dict[str, Any]:
        """What a manifest says of it, beside what was asked for."""
        if self._chosen is None:
            return {}
        return {"method": self._chosen} | ({"instead_of_default": self.failure} if self.failure is not None else {})

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """For what only a calibrated method needs: where it fails, `or_rounding` converts again without."""
        try:
            yield
        except Exception as e:  # models are programs, and fail as they like
            if self._chosen not in CALIBRATED or not self.may_fall_back or isinstance(e, _OF_ANY_METHOD):
                raise
            message = " ".join(str(e).split())
            self.failure = message if isinstance(e, MlxqError) else f"{type(e).__name__}: {message}"
            raise _CannotRun(self.failure) from e

    def or_rounding(self, convert: Callable[[], ConversionResult]) -> ConversionResult:
        """What `convert` makes by this choice; where the default cannot run, what it makes by rounding to nearest."""
        # What failed is let go of before the second time.
        with contextlib.suppress(_CannotRun):
            return convert()
        return convert()
