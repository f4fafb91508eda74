-- SPDX-License-Identifier: Apache-2.0
-- table.sort with a comparator written in Lua: C calls Lua for every comparison.

local function fill(n)
  local values, seed = {}, 42
  for i = 1, n do
    seed = (seed * 1103515245 + 12345) % 2147483648
    values[i] = seed
  end
  return values
end

return function()
  local values = fill(60000)
  table.sort(values, function(a, b)
    return a > b
  end)
  return values[1] .. ":" .. values[#values]
end
