-- wrk -s wrk.lua URL -- METHOD PATH IDS [BODY]
-- Requests are made beforehand, each for a random id of 1..IDS (seeded: every run and
-- every peer gets the same ones): "{id}" stands for it, "{id15}" with leading zeros.
local requests, turn = {}, 0

function init(args)
  math.randomseed(7)
  local headers = { ["Content-Type"] = args[4] and "application/json", ["Accept"] = "application/json" }
  for n = 1, 10000 do
    local id = math.random(tonumber(args[3]))
    local function fill(text)
      return text and text:gsub("{id}", id):gsub("{id15}", string.format("%015d", id)) or nil
    end
    requests[n] = wrk.format(args[1], fill(args[2]), headers, fill(args[4]))
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency, _)
  local e = summary.errors
  local failed = e.connect + e.read + e.write + e.status + e.timeout
  io.write(string.format("RESULT %d %d %d %d %d\n", summary.requests, summary.duration, failed,
    latency:percentile(50), latency:percentile(99)))
end
