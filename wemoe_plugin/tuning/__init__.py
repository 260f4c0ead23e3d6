"""Tune routers on unlabeled data: objectives, a guard against collapse, the loop."""
