"""What a model is worth, and what it gives: evaluation, floors, export, recommendations, report.

Enters: trained tables or exported models. Leaves: reports, comparisons, files of predictions and recommendations.
May import: ``prepare``, ``pages``, ``run``, ``model``, ``data``, ``cluster``, ``kernels`` and the top level.
"""
