"""One self-contained HTML file about runs, that can be mailed: no network, no other file.

A page is plain data (`content`), which `render` turns into HTML. Sections about runs come from `quality`, `training`,
`cases` and `provenance`; anything else that has tables and figures, such as an experiment, builds its own:

    Page("My experiment", "MovieLens-100k", (Section("Results", (Table.of(["run", "NDCG@10"], rows),)),))
"""
