-- Why: uptime is kept by device and day, so that two years of it remain after the heartbeats were archived.
-- Lock: none on existing tables.
-- To prepare: nothing. The next nightly run makes the days that are still in partitions: about 10 s for a day of 2,000
-- devices at 60 s.

CREATE TABLE day_places (
    place_no integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    site     text,
    zone     text,
    hours    text
);
CREATE UNIQUE INDEX day_places_place ON day_places (coalesce(site, ''), coalesce(zone, ''), coalesce(hours, ''));

CREATE TABLE device_days (
    device_no       integer NOT NULL,
    day             date NOT NULL,
    place_no        integer NOT NULL,
    closed_tenths   smallint NOT NULL,
    ours_tenths     smallint NOT NULL,
    heard_tenths    smallint NOT NULL,
    replayed_tenths smallint NOT NULL,
    off_tenths      smallint NOT NULL,
    unknown_tenths  smallint NOT NULL,
    unity_tenths    smallint NOT NULL,
    flaps           smallint NOT NULL,
    reboots         smallint NOT NULL,
    battery_least   smallint,
    is_open         boolean NOT NULL,
    PRIMARY KEY (day, device_no)
) PARTITION BY RANGE (day);
CREATE INDEX device_days_open ON device_days (device_no) WHERE is_open;

CREATE TABLE days_made (
    day     date PRIMARY KEY,
    written bigint NOT NULL,
    made_at timestamptz NOT NULL
);
