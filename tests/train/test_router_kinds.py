"""Which routers a recipe may ask for: those there are, for the experts that it carves."""

from __future__ import annotations

import pytest

from dynaconv.config import RunConfig
from dynaconv.dynamic.routers.kinds import KINDS
from dynaconv.dynamic.routers.width import WidthRouter
from dynaconv.train.router_kinds import choices, router_kind, router_objective
from dynaconv.train.stage import FinetuneStage


def wrong(experts: str, router: str) -> list[str]:
    config = RunConfig(experts=experts)
    config.finetune.router = router
    return FinetuneStage().problems(config)


@pytest.mark.parametrize("experts", ["nested", "routed"])
def test_each_kind_of_experts_has_routers_of_its_own(experts: str) -> None:
    fitting = choices(experts)
    assert {"auto"} < set(fitting) <= {"auto", "uniform", *KINDS}
    for router in ("auto", "uniform", *KINDS, "", "gates"):
        found = wrong(experts, router)
        assert found == [] if router in fitting else len(found) == 1
        if found:
            assert found[0].startswith(f"finetune.router is {router!r}; it must be one of {', '.join(fitting)} where")


def test_what_there_is() -> None:
    assert choices("routed") == ["auto", "linear"]
    assert choices("nested") == ["auto", "width", "curve", "class", "uniform"]


def test_a_near_miss_is_suggested_and_a_former_name_is_known() -> None:
    assert wrong("nested", "widths")[0].endswith("('width'?)")
    for experts in ("nested", "routed"):
        (said,) = wrong(experts, "gate")
        assert said.endswith("('gate' is called 'width' now; 'auto' takes what fits the experts)")


def test_a_kind_that_is_registered_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wider(WidthRouter):
        kind = "wider"

    monkeypatch.setitem(KINDS, "wider", Wider)
    assert wrong("nested", "wider") == []
    config = RunConfig()
    config.finetune.router = "wider"
    assert router_kind(config.finetune, "nested") is Wider and router_objective(config.finetune) == "dial"
