-- SPDX-License-Identifier: Apache-2.0
-- Method calls through metatables, with one level of inheritance.

local Shape = {}
Shape.__index = Shape

function Shape.new(class, size)
  return setmetatable({ size = size, grown = 0 }, class)
end

function Shape:area()
  return self.size
end

function Shape:grow(step)
  self.grown = self.grown + step
  return self
end

local function subclass(area)
  local class = setmetatable({ area = area }, { __index = Shape })
  class.__index = class
  return class
end

local Square = subclass(function(self)
  return self.size * self.size
end)
local Bar = subclass(function(self)
  return self.size * 3 + self.grown
end)

return function()
  local shapes, total = {}, 0
  for i = 1, 300 do
    local class = i % 3 == 0 and Shape or i % 3 == 1 and Square or Bar
    shapes[i] = Shape.new(class, i % 11)
  end
  for round = 1, 1600 do
    for i = 1, #shapes do
      total = total + shapes[i]:grow(round & 3):area()
    end
  end
  return total
end
