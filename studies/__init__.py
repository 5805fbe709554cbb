"""Studies: declared matrices of arms and seeds, run one after another, and the pages of what they show.

A guest of the package that is not installed with it: `icons` and `cc12m` name their sources, sets and recipes as any
other package does, "studies.icons.sources:IconSplits:train" and studies/icons/recipe.py, and nothing imports them.
"""
