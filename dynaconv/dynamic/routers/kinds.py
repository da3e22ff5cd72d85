"""The router kinds there are, by name. Ships with every exported model."""

from __future__ import annotations

from dynaconv.dynamic.routers.base import Router
from dynaconv.dynamic.routers.curve import CurveRouter
from dynaconv.dynamic.routers.difficulty_class import ClassRouter
from dynaconv.dynamic.routers.linear import LinearRouter
from dynaconv.dynamic.routers.sketch import SketchRouter
from dynaconv.dynamic.routers.uniform import UniformRouter
from dynaconv.dynamic.routers.width import WidthRouter

KINDS: dict[str, type[Router]] = {
    router.kind: router for router in (UniformRouter, WidthRouter, CurveRouter, ClassRouter, LinearRouter, SketchRouter)
}
