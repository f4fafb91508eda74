-- SPDX-License-Identifier: Apache-2.0
-- Closures made and called, with upvalues read and written.

local function counter(step)
  local value = 0
  return function(amount)
    value = value + step * amount
    return value
  end
end

local function compose(f, g)
  return function(x)
    return f(g(x)) % 1000003
  end
end

return function()
  local total = 0
  for i = 1, 30000 do
    local add = counter(i % 7)
    local both = compose(add, function(x)
      return x + i
    end)
    for j = 1, 8 do
      total = (total + both(j)) % 1000003
    end
  end
  return total
end
