"""Pages that people read: charts as inline SVG, and one set of templates for every page of the system.

Enters: figures as plain numbers, dicts and lists. Leaves: one HTML text a page that needs no other file and no network.
May import: errors, storage, config, log, metrics.
"""
