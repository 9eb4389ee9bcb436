-- Why: the name that people gave a device (in NexMDM, or in a table for `nexhb devices import`) was overwritten by the alias of
-- its next heartbeat. It has a column of its own now, which no heartbeat writes. The next import from NexMDM fills it.
-- Lock: ACCESS EXCLUSIVE on devices and device_last_status for milliseconds; neither is rewritten.
-- To prepare: nothing.

ALTER TABLE devices ADD COLUMN name text, ADD COLUMN nexmdm_name text;
ALTER TABLE device_last_status ADD COLUMN name text;

CREATE OR REPLACE FUNCTION tell_last_status() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE device_last_status SET
        alias = NEW.alias,
        name = NEW.name,
        status = CASE WHEN NEW.revoked_at IS NOT NULL THEN 'revoked' WHEN status = 'revoked' THEN 'ok' ELSE status END
    WHERE device_no = NEW.device_no;
    RETURN NULL;
END $$;
DROP TRIGGER devices_tell_last_status ON devices;
CREATE TRIGGER devices_tell_last_status AFTER UPDATE OF alias, name, revoked_at ON devices FOR EACH ROW
    WHEN (NEW.alias IS DISTINCT FROM OLD.alias OR NEW.name IS DISTINCT FROM OLD.name
          OR (NEW.revoked_at IS NULL) <> (OLD.revoked_at IS NULL))
    EXECUTE FUNCTION tell_last_status();

CREATE OR REPLACE FUNCTION ask_device() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    device record;
BEGIN
    SELECT alias, name, revoked_at IS NOT NULL AS revoked INTO device
    FROM devices WHERE device_no = NEW.device_no FOR SHARE;
    IF device.revoked OR device.alias IS NOT NULL OR device.name IS NOT NULL THEN
        UPDATE device_last_status SET
            alias = device.alias,
            name = device.name,
            status = CASE WHEN device.revoked THEN 'revoked' ELSE status END
        WHERE device_no = NEW.device_no;
    END IF;
    RETURN NULL;
END $$;
