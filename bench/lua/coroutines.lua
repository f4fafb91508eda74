-- SPDX-License-Identifier: Apache-2.0
-- Producers and consumers: resume, yield and wrap.

local function produce(n)
  return coroutine.wrap(function()
    for i = 1, n do
      coroutine.yield(i)
    end
  end)
end

local function filter(source, divisor)
  return coroutine.wrap(function()
    for value in source do
      if value % divisor ~= 0 then
        coroutine.yield(value)
      end
    end
  end)
end

return function()
  local total = 0
  for _ = 1, 60 do
    for value in filter(filter(produce(4000), 3), 5) do
      total = total + value
    end
  end
  return total
end
