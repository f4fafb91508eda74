-- SPDX-License-Identifier: Apache-2.0
-- Runs one workload script, one iteration for each line on standard input.
-- Usage: lua driver.lua DIRECTORY NAME. Prints "ready", then "NANOSECONDS RESULT" for each
-- iteration: CPU time of the process, which other load on the machine disturbs least, and
-- a result that must be the same in every build. Garbage is collected between iterations,
-- outside the measured time, so that each starts from the same heap.

local directory, name = arg[1], arg[2]
local work = dofile(directory .. "/" .. name .. ".lua")

io.stdout:setvbuf("line")
print("ready")
for _ in io.lines() do
  collectgarbage()
  local begin = os.clock()
  local result = work()
  local elapsed = os.clock() - begin
  print(string.format("%d %s", math.floor(elapsed * 1e9 + 0.5), result))
end
