"""From sources to the rows of every step: one batch a step, the same on every rank, resumable.

    records of each source                                                              Sequence[Record]
      | row_facts         text ids and lengths of all rows                  separate.py RowFacts
      v
    PlannedSource         rows, batch size, weight, task, facts             plan.py
      | cut               which groups by length, how many batches of each  passes.py   Cut
      | Cut.draw          a fresh permutation, cut into batches             passes.py   Pass
      |   separate        ... in which no two rows share a text             separate.py
      | steps_of_sources  steps of each source in an epoch                  config.py   tuple[int, ...]
      | source_order      the source of each step of an epoch               config.py   source_S
      v
    BatchPlan.at(step)    source, visit and rows of a step                  plan.py     PlannedStep
      | rows_of           one rank's share of them                                      row numbers
      v
    embedsmith.train.feed draws their texts

Everything is a function of the recipe, the facts and the step number, so that a run goes on where it stopped, and on
another number of ranks if it must. What a recipe may ask for: `PlanConfig` (`config.py`).
"""
