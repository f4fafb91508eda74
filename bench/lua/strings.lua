-- SPDX-License-Identifier: Apache-2.0
-- Patterns, formatting and concatenation: Lua calls C library functions.

return function()
  local parts, words = {}, 0
  for i = 1, 15000 do
    local line = string.format("%d:%s:%05d", i, "item", i * 7 % 1000)
    line = line:gsub("%d+", function(digits)
      return digits .. "."
    end)
    words = words + select(2, line:gsub("%a+", "%0%0"))
    parts[#parts + 1] = line:sub(2, -2):upper() .. line:len()
    for piece in line:gmatch("[^:]+") do
      words = words + #piece + (piece:byte(1) & 1)
    end
  end
  local text = table.concat(parts, ",")
  return words .. ":" .. #text .. ":" .. text:sub(1, 12)
end
