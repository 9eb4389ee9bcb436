-- Why: a store that is not the one that the database knows (a folder that is not mounted, an empty bucket) is told by its
-- marker; manifests that a later archive of the same day replaced are told from those that the catalog lacks.
-- Lock: none but on the new tables.
-- To prepare: nothing.

CREATE TABLE archive_markers (
    place     text PRIMARY KEY,
    marker    text NOT NULL,
    marked_at timestamptz NOT NULL
);

CREATE TABLE archive_superseded (
    archive_url   text PRIMARY KEY,
    superseded_at timestamptz NOT NULL
);
