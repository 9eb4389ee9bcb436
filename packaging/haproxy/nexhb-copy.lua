-- `http-request lua.copy_to_nexmdm URL` sends a copy of a heartbeat to the NexMDM at URL. A separate task does it, so
-- that the device does not wait. This file belongs in /etc/haproxy/. In each thread at most 32 copies wait for NexMDM;
-- those beyond the limit are dropped, with a line in the log. A heartbeat that does not fit into one buffer
-- (tune.bufsize) or comes without a Content-Length is not copied.

local max_waiting, timeout_ms = 32, 10000
local waiting, dropped = 0, 0
local forwarded_headers = {"authorization", "content-type", "user-agent", "x-forwarded-for", "x-forwarded-proto"}

local function copy(request)
    local ok, response = pcall(function()
        return core.httpclient():post(request)
    end)
    waiting = waiting - 1
    if not ok or response == nil or response.status == nil or response.status == 0 then
        core.Warning("copy_to_nexmdm: no response from " .. request.url)
    end
end

core.register_action("copy_to_nexmdm", {"http-req"}, function(txn, nexmdm)
    local body = txn.sf:req_body()
    if #body == 0 or tostring(#body) ~= txn.sf:req_hdr("content-length") then
        return
    end
    if waiting >= max_waiting then
        dropped = dropped + 1
        core.Warning("copy_to_nexmdm: " .. max_waiting .. " copies wait for a response; " .. dropped .. " were dropped")
        return
    end
    local headers = {["content-length"] = {tostring(#body)}}
    for _, name in ipairs(forwarded_headers) do
        local value = txn.sf:req_hdr(name)
        if value ~= "" then
            headers[name] = {value}
        end
    end
    waiting = waiting + 1
    core.register_task(function()
        copy({url = nexmdm .. "/v1/heartbeat", headers = headers, body = body, timeout = timeout_ms})
    end)
end, 1)
