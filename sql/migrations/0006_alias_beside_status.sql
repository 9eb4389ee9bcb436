-- Why: the lists of devices read the alias from the row that they read anyway; looking it up in devices took four fifths
-- of the time that PostgreSQL needs for 1,000 silent devices of a million.
-- Lock: ACCESS EXCLUSIVE on device_last_status while the aliases are copied, and heartbeats wait meanwhile: 1 s with
-- 100,000 devices, 20 s with a million (2 cores).
-- To prepare: nothing up to 100,000 devices. With a million, a quiet hour, and VACUUM device_last_status afterwards.

ALTER TABLE device_last_status ADD COLUMN alias text;

UPDATE device_last_status s SET alias = d.alias FROM devices d
WHERE d.device_no = s.device_no AND d.alias IS NOT NULL;

UPDATE device_last_status s SET status = 'revoked' FROM devices d
WHERE d.device_no = s.device_no AND d.revoked_at IS NOT NULL AND s.status <> 'revoked';

CREATE FUNCTION tell_last_status() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE device_last_status SET
        alias = NEW.alias,
        status = CASE WHEN NEW.revoked_at IS NOT NULL THEN 'revoked' WHEN status = 'revoked' THEN 'ok' ELSE status END
    WHERE device_no = NEW.device_no;
    RETURN NULL;
END $$;
CREATE TRIGGER devices_tell_last_status AFTER UPDATE OF alias, revoked_at ON devices FOR EACH ROW
    WHEN (NEW.alias IS DISTINCT FROM OLD.alias OR (NEW.revoked_at IS NULL) <> (OLD.revoked_at IS NULL))
    EXECUTE FUNCTION tell_last_status();

CREATE FUNCTION ask_device() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    device record;
BEGIN
    SELECT alias, revoked_at IS NOT NULL AS revoked INTO device FROM devices WHERE device_no = NEW.device_no FOR SHARE;
    IF device.revoked OR device.alias IS NOT NULL THEN
        UPDATE device_last_status SET
            alias = device.alias,
            status = CASE WHEN device.revoked THEN 'revoked' ELSE status END
        WHERE device_no = NEW.device_no;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER last_status_asks_device AFTER INSERT ON device_last_status FOR EACH ROW
    WHEN (NEW.alias IS NULL)
    EXECUTE FUNCTION ask_device();
