"""Choosing: which compression, on which device, under which settings, meets a load, its targets and a budget."""

from __future__ import annotations

from kvsim.planner.answer import Plan, PlanPoint
from kvsim.planner.find import plan
from kvsim.planner.request import Budget, PlanRequest, Search

__all__ = ["Budget", "Plan", "PlanPoint", "PlanRequest", "Search", "plan"]
