-- Why: flags that reach every daemon at once, with a history of who changed what; the comparisons of perf_diff.
-- Lock: none that matters. feature_flags is locked for a moment; nobody reads it on a heartbeat's way.
-- To prepare: nothing.

CREATE TABLE feature_flag_changes (
    change_no  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    flag       text NOT NULL,
    value_from jsonb,
    value_to   jsonb,
    changed_at timestamptz NOT NULL,
    changed_by text NOT NULL
);

CREATE FUNCTION note_flag_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        INSERT INTO feature_flag_changes (flag, value_from, changed_at, changed_by)
        VALUES (OLD.flag, OLD.value, now(), session_user || ' (DELETE)');
    ELSIF TG_OP = 'INSERT' THEN
        INSERT INTO feature_flag_changes (flag, value_to, changed_at, changed_by)
        VALUES (NEW.flag, NEW.value, NEW.changed_at, NEW.changed_by);
    ELSIF NEW.value IS DISTINCT FROM OLD.value THEN
        INSERT INTO feature_flag_changes (flag, value_from, value_to, changed_at, changed_by)
        VALUES (NEW.flag, OLD.value, NEW.value, NEW.changed_at, NEW.changed_by);
    END IF;
    PERFORM pg_notify('nexhb_flags', '');
    RETURN NULL;
END $$;
CREATE TRIGGER feature_flags_changed AFTER INSERT OR UPDATE OR DELETE ON feature_flags
    FOR EACH ROW EXECUTE FUNCTION note_flag_change();

CREATE TABLE perf_diff_comparisons (
    comparison_no bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    query         text NOT NULL,
    compared_at   timestamptz NOT NULL,
    fast_ms       real NOT NULL,
    legacy_ms     real NOT NULL,
    fast_rows     integer NOT NULL,
    legacy_rows   integer NOT NULL,
    rows_differ   integer NOT NULL,
    examples      text[] NOT NULL,
    host          text NOT NULL
);
CREATE INDEX perf_diff_comparisons_at ON perf_diff_comparisons (compared_at);
